"""Quantised weights: each backend gives the logits of the float weights that they stand for, at once and token by token."""

import numpy as np
import pytest

from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.model.params import initial_params
from smedjan_common.model.quantization import names, planned, quantized_names
from smedjan_common.model.rounding import Quantized, dequantize, quantize
from smedjan_common.reference import model as reference
from tests.conformance import subjects

SIZES = {"vocab_size": 100, "dim": 32, "heads": 4, "init_std": 0.15, "context_length": 32}
MODELS = {
    "attention-untied": {"layers": 1, "kv_heads": 2, "tied_head": False, "qkv_bias": True, "mixer": ("attention",)},
    "experts": {
        **{"layers": 1, "mixer": ("mla",), "ffn": ("experts",), "experts": 4, "experts_per_token": 2},
        **{"expert_dim": 32, "shared_experts": 1, "mla_kv_rank": 32},
    },
    "recurrent": {
        **{"layers": 2, "mixer": ("linear", "rwkv"), "norm_eps": 0.03, "rwkv_head_dim": 8},
    },
}


def quantized_params(config: ModelConfig, params: subjects.Params, bits: int) -> subjects.Params:
    """Parameters of a model with all that is quantised as three arrays each."""
    plan, found = planned(config, bits), dict(params)
    for name, width in plan.items():
        found |= dict(zip(names(name), quantize(params[name], width), strict=True))
    return found


def whole_params(params: subjects.Params) -> subjects.Params:
    """The way back: float32 parameters, as the quantised ones are computed with."""
    quantized = quantized_names(params)
    parts = {part for name in quantized for part in names(name)[1:]}
    return {
        name: dequantize(Quantized(*(params[part] for part in names(name)))) if name in quantized else array
        for name, array in params.items()
        if name not in parts
    }


@pytest.mark.parametrize(("name", "bits"), [("attention-untied", 8), *((name, 4) for name in MODELS)])
def test_logits_are_those_of_the_float_weights(backend: str, name: str, bits: int):
    model = ModelConfig.build(**{**SIZES, **MODELS[name]})
    params = quantized_params(model, initial_params(model, 3), bits)
    whole = whole_params(params)
    assert quantized_names(params) == set(planned(model, bits)) > {"embed.weight", "layers.0.mixer.o_proj.weight"}
    assert np.abs(whole["embed.weight"] - initial_params(model, 3)["embed.weight"]).max() > 0
    tokens = np.random.default_rng(0).integers(0, 100, (2, 9), dtype=np.int32)
    want = reference.forward(model, whole, tokens)[..., :100]
    side = subjects.backend(backend, model, TrainConfig(steps=1, batch_size=1, seq_len=8, lr=1e-3))
    placed = side.place(params)
    assert np.abs(side.logits(placed, tokens) - want).max() < 2e-5
    decoder = side.decoder(placed, 16, 1)
    found = [decoder.feed(tokens[0, :8]), decoder.step(tokens[0, 8:], np.array([True]))[0]]
    assert np.abs(np.stack(found) - want[0, 7:]).max() < 2e-5
