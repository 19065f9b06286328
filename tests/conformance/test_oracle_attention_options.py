"""The outside: attention with qk_norm is transformers' Qwen3Attention, with a window MistralAttention (torch, CPU, eager), weights alike.

Outputs and every gradient. The mask of the window is transformers' own, made by its function and not here.
"""

import dataclasses
import importlib
from typing import Any

import numpy as np
import pytest

from smedjan_common.config import ModelConfig
from tests.conformance import one_mixer
from tests.conformance.compare import Difference, Mismatch, demand, largest, tensors
from tests.conformance.gates import FLOAT32

torch = pytest.importorskip("torch", reason="torch is not installed (extra: oracle)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: oracle)")
masking = pytest.importorskip("transformers.masking_utils", reason="transformers is not installed (extra: oracle)")

pytestmark = [pytest.mark.oracle, pytest.mark.xdist_group("oracle")]

FORMS: dict[str, tuple[dict[str, Any], int, int]] = {  # options, batch, length
    "qk norm": ({"qk_norm": True}, 2, 17),
    "qk norm, grouped": ({"qk_norm": True, "kv_heads": 2}, 1, 33),
    "window": ({"window": 5}, 2, 17),
    "window, grouped": ({"window": 8, "kv_heads": 1}, 2, 30),
    "window of one": ({"window": 1}, 2, 9),
    "window as long as the text": ({"window": 12}, 2, 12),
    "window longer than the text": ({"window": 40}, 2, 12),
    "both": ({"qk_norm": True, "window": 7, "kv_heads": 2}, 2, 29),
}
IMPLEMENTATIONS = ("plain", "auto")


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> tuple[ModelConfig, np.ndarray]:
    """A model and an input."""
    options, batch, length = FORMS[request.param]
    model = one_mixer.config("attention", **options)
    return model, one_mixer.normal(model, batch, length)


def oracle(model: ModelConfig, params: dict[str, np.ndarray]) -> tuple[Any, Any]:
    """A module of transformers in float64 with these weights, and a function of x [B, T, D] that gives its output."""
    kind = "Qwen3" if model.qk_norm else "Mistral"
    modeling = importlib.import_module(f"transformers.models.{kind.lower()}.modeling_{kind.lower()}")
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=model.dim,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        num_hidden_layers=1,
        max_position_embeddings=model.context_length,
        rms_norm_eps=model.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_base},
        sliding_window=model.window or None,
        **({"use_sliding_window": bool(model.window), "max_window_layers": 0} if kind == "Qwen3" else {}),
    )
    config._attn_implementation = "eager"
    attention = getattr(modeling, f"{kind}Attention")(config, 0).double()
    attention.load_state_dict({name: torch.tensor(value).double() for name, value in params.items()})
    rotary = getattr(modeling, f"{kind}RotaryEmbedding")(config)
    make_mask = masking.create_sliding_window_causal_mask if model.window else masking.create_causal_mask

    def run(x: Any) -> Any:
        at = torch.arange(x.shape[1])[None]
        mask = make_mask(config=config, inputs_embeds=x, attention_mask=None, past_key_values=None, position_ids=at)
        return attention(x, rotary(x, at), mask)[0]

    return attention, run


def test_output_and_every_gradient_equal_transformers(backend: str, form: tuple[ModelConfig, np.ndarray]):
    model, x = form
    params, outer = one_mixer.tensors(model), one_mixer.normal(model, *x.shape[:2], seed=1)
    attention, run = oracle(model, params)
    leaf = torch.tensor(x).double().requires_grad_()
    expected = run(leaf)
    (expected * torch.tensor(outer)).sum().backward()
    slopes = {name: parameter.grad.numpy() for name, parameter in attention.named_parameters()} | {"x": leaf.grad.numpy()}
    slopes = {name: value for name, value in slopes.items() if np.abs(value).max() > 1e-12}  # a window of one: nothing is weighed
    got = {how: one_mixer.output(backend, model, params, x, how) for how in IMPLEMENTATIONS}
    got["definition"] = one_mixer.reference_output(model, params, x)
    demand(Difference(how, largest(value, expected.detach().numpy()), FLOAT32.oracle) for how, value in got.items())
    for how in IMPLEMENTATIONS:
        grads = one_mixer.gradients(backend, model, params, x, outer, how)
        demand(tensors({name: grads[name] for name in slopes}, slopes, FLOAT32.oracle, f"{how} gradient of "))


@pytest.mark.parametrize("changed", [{"window": 6}, {"window": 8}, {"norm_eps": 1e-3}, {"rope_base": 10100.0}], ids=str)
def test_attention_that_is_off_is_caught_by_the_oracle(backend: str, changed: dict[str, Any]):
    options, batch, length = FORMS["both"]
    model = one_mixer.config("attention", **options)
    params, x = one_mixer.tensors(model), one_mixer.normal(model, batch, length)
    with torch.no_grad():
        expected = oracle(model, params)[1](torch.tensor(x).double()).numpy()
    got = one_mixer.output(backend, dataclasses.replace(model, **changed), params, x)
    with pytest.raises(Mismatch):
        demand([Difference("output", largest(got, expected), FLOAT32.oracle)])
