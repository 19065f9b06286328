"""Rounding of weights, and the exact bridges to llama.cpp's blocks: both bit for bit as the package gguf has them."""

import numpy as np
import pytest

from convert.gguf_blocks import from_blocks, to_blocks
from smedjan_common.config import ModelConfig
from smedjan_common.errors import CheckpointError
from smedjan_common.model.quantization import planned
from smedjan_common.model.rounding import dequantize, pack, quantize, unpack

gguf = pytest.importorskip("gguf", reason="gguf is not installed (extra: gguf)")


def weights() -> np.ndarray:
    rng = np.random.default_rng(5)
    array = (rng.standard_t(6, (6, 96)) * 0.02).astype(np.float32)
    array[0, :32], array[1, :32], array[2, 32:64] = 0, 0.5, np.arange(32)  # nothing to scale, all equal, exact halves between codes
    array[3, :32] = np.abs(array[3, :32]) * 1e-6  # scales that are subnormal in float16
    return array


@pytest.mark.parametrize(("bits", "kind"), [(8, "Q8_0"), (4, "Q4_1")])
def test_rounding_is_that_of_llama_cpp(bits: int, kind: str):
    number = gguf.GGMLQuantizationType[kind]
    blocks = gguf.quantize(weights(), number)
    ours = quantize(weights(), bits)
    assert np.array_equal(to_blocks(ours, kind), blocks.reshape(6, -1).view(np.uint8))
    assert np.array_equal(dequantize(ours), gguf.dequantize(blocks, number))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_blocks_of_llama_cpp_pass_exactly_there_and_back(kind: str):
    number = gguf.GGMLQuantizationType[kind]
    blocks = np.ascontiguousarray(gguf.quantize(weights(), number)).view(np.uint8).reshape(6, -1)
    ours = from_blocks(blocks, kind)
    assert np.array_equal(dequantize(ours), gguf.dequantize(blocks, number))
    assert np.array_equal(to_blocks(ours, kind), blocks)


def test_q4_0_is_a_q4_1_too():
    number = gguf.GGMLQuantizationType.Q4_0
    blocks = np.ascontiguousarray(gguf.quantize(weights(), number)).view(np.uint8).reshape(6, -1)
    again = to_blocks(from_blocks(blocks, "Q4_0"), "Q4_1")
    assert np.array_equal(gguf.dequantize(again, gguf.GGMLQuantizationType.Q4_1), gguf.dequantize(blocks, number))


def test_other_biases_have_no_q8_0():
    ours = quantize(weights(), 8)
    with pytest.raises(CheckpointError, match="cannot be written as Q8_0"):
        to_blocks(ours._replace(biases=ours.biases + np.float16(0.25)), "Q8_0")


@pytest.mark.parametrize("bits", [8, 4])
def test_words_hold_codes_from_the_lowest_bits_on(bits: int):
    codes = np.random.default_rng(1).integers(0, 2**bits, (3, 2, 64)).astype(np.uint8)
    words = pack(codes, bits)
    assert words.dtype == np.uint32
    assert words.shape == (3, 2, 2 * bits)
    assert words[0, 0, 0] == sum(int(code) << (bits * at) for at, code in enumerate(codes[0, 0, : 32 // bits]))
    assert np.array_equal(unpack(words, bits), codes)


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_beyond_float16_are_refused(bits: int):
    with pytest.raises(CheckpointError, match="too large"):
        quantize(np.full((1, 32), 1e7, np.float32) * np.where(np.arange(32) % 2, 1, -1).astype(np.float32), bits)


def test_what_is_quantised():
    values = {"vocab_size": 100, "dim": 32, "layers": 1, "heads": 2, "tied_head": False}
    plan = planned(ModelConfig.build(**values, ffn=("experts",), experts=2, expert_dim=40), 4)
    assert plan["embed.weight"] == plan["head.weight"] == 8
    assert plan["layers.0.ffn.gate_proj.weight"] == plan["layers.0.mixer.q_proj.weight"] == 4
    absent = {"layers.0.ffn.down_proj.weight", "layers.0.ffn.router.weight", "norm.weight", "layers.0.mixer_norm.weight"}
    assert not absent & plan.keys(), "rows of 40, a router, norms"
