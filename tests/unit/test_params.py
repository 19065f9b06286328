"""The parameter table: exact counts, initial values that depend on nothing but seed and name, and what differs from a model is named."""

import dataclasses
import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smedjan_common.config import ModelConfig
from smedjan_common.model.params import check_tree, count_params, draw, initial_params, initial_value, parameter_table
from smedjan_common.model.presets import PRESETS

TINY = ModelConfig.preset("tiny")

COUNTS = {
    "tiny": 2_098_304,
    "small": 7_212_288,
    "medium": 45_101_568,
    "large": 213_943_296,
    "xl": 602_469_888,
    "xxl": 1_250_002_944,
    "huge": 2_558_691_840,
    "max": 6_509_826_048,
}

# the first three values and a hash of all, float32, seed 0: a change here makes every earlier seed mean another run
GOLDEN = {
    "embed.weight": (["-0x1.41b2eap-6", "0x1.10e5e4p-8", "0x1.8a0630p-9"], "cb904615f23113ba"),
    "layers.0.mixer.q_proj.weight": (["-0x1.a5868ap-6", "0x1.b75656p-12", "0x1.45572cp-6"], "4341d80fea0fabe6"),
    "layers.3.ffn.down_proj.weight": (["0x1.0138ccp-6", "0x1.5f0390p-8", "0x1.8b9a94p-8"], "a736e13053d99b01"),
}


@pytest.mark.parametrize("size", PRESETS)
def test_every_preset_has_its_exact_count(size: str):
    config = ModelConfig.preset(size, vocab_size=8192)
    assert count_params(config) == config.num_params() == COUNTS[size]


@given(
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1), (6, 3)]), layers=st.integers(1, 5), vocab=st.integers(1, 300), ffn=st.integers(1, 300)
)
def test_the_count_is_the_closed_form(heads: tuple[int, int], layers: int, vocab: int, ffn: int):
    config = ModelConfig(vocab_size=vocab, dim=48, layers=layers, heads=heads[0], kv_heads=heads[1], ffn_dim=ffn)
    padded = (vocab + 63) // 64 * 64
    kv = 48 * heads[1] // heads[0]
    assert count_params(config) == padded * 48 + layers * (2 * 48 * 48 + 2 * 48 * kv + 3 * 48 * ffn + 2 * 48) + 48


def test_names_are_those_of_the_design():
    assert list(parameter_table(dataclasses.replace(TINY, layers=1))) == [
        "embed.weight",
        "layers.0.mixer_norm.weight",
        "layers.0.mixer.q_proj.weight",
        "layers.0.mixer.k_proj.weight",
        "layers.0.mixer.v_proj.weight",
        "layers.0.mixer.o_proj.weight",
        "layers.0.ffn_norm.weight",
        "layers.0.ffn.gate_proj.weight",
        "layers.0.ffn.up_proj.weight",
        "layers.0.ffn.down_proj.weight",
        "norm.weight",
    ]


def test_every_dimension_has_an_axis_and_norms_are_not_decayed():
    for name, spec in parameter_table(TINY).items():
        assert spec.name == name
        assert len(spec.axes) == len(spec.shape)
        assert spec.decay == (len(spec.shape) == 2), name


@pytest.mark.parametrize("name", GOLDEN)
def test_initial_values_are_the_golden_bits(name: str):
    value = initial_value(parameter_table(TINY)[name], seed=0)
    first, digest = GOLDEN[name]
    assert value.dtype == np.float32
    assert value.ravel()[:3].tolist() == [float.fromhex(number) for number in first]
    assert hashlib.sha256(value.tobytes()).hexdigest().startswith(digest)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**40), data=st.data())
def test_an_initial_value_does_not_depend_on_order_or_on_the_other_tensors(seed: int, data: st.DataObject):
    config = ModelConfig(vocab_size=64, dim=16, layers=2, heads=2, kv_heads=1, ffn_dim=32)
    table = parameter_table(config)
    together = initial_params(config, seed)
    assert list(together) == list(table)
    for name in data.draw(st.permutations(list(table))):
        assert initial_value(table[name], seed).tobytes() == together[name].tobytes()


def test_the_digest_tells_initial_values_apart_by_seed_by_one_bit_and_by_name(monkeypatch):
    config = ModelConfig(vocab_size=64, dim=16, layers=2, heads=2, kv_heads=1, ffn_dim=32)
    params, digest = draw(config, 3)
    assert draw(config, 3)[1] == digest
    assert len(digest) == 64
    assert params.keys() == initial_params(config, 3).keys()
    assert draw(config, 4)[1] != digest
    assert draw(dataclasses.replace(config, mixer=("attention", "linear")), 3)[1] != digest

    def one_bit(spec, seed):
        value = initial_value(spec, seed)
        if spec.name == "layers.1.ffn.up_proj.weight":
            value.view(np.uint32)[-1, -1] ^= 1
        return value

    monkeypatch.setattr("smedjan_common.model.params.initial_value", one_bit)
    assert draw(config, 3)[1] != digest


def test_a_narrow_rwkv_is_drawn_whose_orthogonal_weights_lie_transposed():
    sizes = {"vocab_size": 300, "dim": 16, "layers": 1, "heads": 2, "kv_heads": 2, "ffn_dim": 32, "rwkv_head_dim": 8}
    params, digest = draw(ModelConfig(mixer=("rwkv",), context_length=16, **sizes), 3)
    assert not params["layers.0.mixer.w2.weight"].flags.c_contiguous
    assert len(digest) == 64


def test_a_deeper_model_keeps_the_values_that_depth_does_not_scale():
    shallow, deep = (initial_params(dataclasses.replace(TINY, layers=layers), 3) for layers in (2, 3))
    for name, value in shallow.items():
        if not name.endswith(("o_proj.weight", "down_proj.weight")):
            assert deep[name].tobytes() == value.tobytes(), name


def test_initial_values_are_the_same_in_another_process():
    code = (
        "from smedjan_common.config import ModelConfig as M; from smedjan_common.model.params import initial_params as p; import hashlib\n"
    )
    code += "print(hashlib.sha256(b''.join(v.tobytes() for v in p(M.preset('tiny'), 0).values())).hexdigest())"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    here = hashlib.sha256(b"".join(value.tobytes() for value in initial_params(TINY, 0).values())).hexdigest()
    assert there == here


def test_seeds_and_names_give_different_values():
    first, second = initial_params(TINY, 0), initial_params(TINY, 1)
    assert not np.array_equal(first["embed.weight"], second["embed.weight"])
    assert not np.array_equal(first["layers.0.mixer.q_proj.weight"], first["layers.1.mixer.q_proj.weight"])


def test_initial_values_have_the_scale_of_the_table():
    values, std = initial_params(TINY, 0), TINY.init_std
    for name, value in values.items():
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        expected = std / (2 * TINY.layers) ** 0.5 if residual else std
        if value.ndim == 1:
            assert (value == 1).all(), name
        else:
            assert abs(value.std() / expected - 1) < 5 / (2 * value.size) ** 0.5, name
            assert abs(value.mean()) < 5 * expected / value.size**0.5, name


def test_a_tree_that_differs_is_described_by_name():
    values = initial_params(TINY, 0)
    assert check_tree(TINY, values) == []
    wrong = {**values, "extra.weight": values["norm.weight"], "norm.weight": np.zeros(3)}
    del wrong["embed.weight"]
    problems = "\n".join(check_tree(TINY, wrong))
    assert "embed.weight is missing" in problems
    assert "extra.weight is not a parameter" in problems
    assert "norm.weight has shape (3,), the model needs (128,)" in problems
