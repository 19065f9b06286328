"""The outside: the mixer mla is transformers' DeepseekV3Attention (torch, CPU, eager), with the same weights.

Output, and gradients of the input and of every tensor: one query projection or two with a norm between, plain RoPE and YaRN, the rotary
features in halves (as here) and interleaved (as in DeepSeek's files, whose rows are then in another order), several sizes and lengths.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from smedjan_common.config import ModelConfig
from smedjan_common.model.mixers.mla import kv_rank, rope_dim
from tests.conformance import one_mixer, subjects
from tests.conformance.compare import Difference, Mismatch, demand, largest, tensors
from tests.conformance.gates import FLOAT32

torch = pytest.importorskip("torch", reason="torch is not installed (extra: oracle)")
deepseek = pytest.importorskip(
    "transformers.models.deepseek_v3.modeling_deepseek_v3", reason="transformers is not installed (extra: oracle)"
)

pytestmark = [pytest.mark.oracle, pytest.mark.xdist_group("oracle")]

YARN = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_len": 256, "context_length": 1024}


def mscale(by: float) -> float:
    """What DeepSeek's files call so, as a factor of cosines and sines, or of scores."""
    return 0.1 * by * math.log(4.0) + 1


FORMS: dict[str, tuple[dict[str, Any], int, int]] = {  # options, batch, length
    "one projection": ({}, 2, 17),
    "q rank": ({"mla_q_rank": 12}, 2, 17),
    "one token": ({"mla_q_rank": 12}, 3, 1),
    "odd sizes": ({"mla_q_rank": 7, "mla_kv_rank": 9, "mla_rope_dim": 6}, 1, 30),
    "two heads, wide rope": ({"heads": 2, "mla_rope_dim": 16}, 2, 33),
    "yarn": ({"mla_rope_dim": 8, **YARN}, 2, 17),
    "yarn and q rank": ({"mla_rope_dim": 8, "mla_q_rank": 12, **YARN}, 1, 40),
    "heads of 12, one factor": ({"head_size": 12, "mla_q_rank": 12, **YARN, "rope_attention_factor": mscale(0.707)}, 1, 40),
    "two factors": ({**YARN, "rope_attention_factor": mscale(0.7), "mla_plain_factor": mscale(1.5)}, 1, 40),
}
NAMES = {"kv_a_proj.": "kv_a_proj_with_mqa.", "q_a_norm.": "q_a_layernorm.", "kv_a_norm.": "kv_a_layernorm."}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> tuple[ModelConfig, np.ndarray]:
    """A model and an input."""
    return form_of(request.param)


def form_of(name: str) -> tuple[ModelConfig, np.ndarray]:
    options, batch, length = FORMS[name]
    model = one_mixer.config("mla", **options)
    return model, one_mixer.normal(model, batch, length)


def oracle_name(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def oracle(model: ModelConfig, params: subjects.Params, interleave: bool = False) -> tuple[Any, Any]:
    """transformers' attention in float64 with these weights, and its rotary embedding."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_base}
    if model.rope_scaling == "yarn":  # mscale = mscale_all_dim: the whole score is scaled, as in DeepSeek's own files
        rope |= {"rope_type": "yarn", "factor": model.rope_factor, "original_max_position_embeddings": model.rope_original_len}
        factors = {"mscale": model.rope_attention_factor, "mscale_all_dim": model.mla_plain_factor or model.rope_attention_factor}
        rope |= {name: (factor - 1) / (0.1 * math.log(4.0)) if factor else 1.0 for name, factor in factors.items()}
    config = deepseek.DeepseekV3Config(
        hidden_size=model.dim,
        num_attention_heads=model.heads,
        num_key_value_heads=model.heads,
        kv_lora_rank=kv_rank(model),
        q_lora_rank=model.mla_q_rank or None,
        qk_rope_head_dim=rope_dim(model),
        qk_nope_head_dim=model.head_dim,
        v_head_dim=model.head_dim,
        max_position_embeddings=model.context_length,
        rms_norm_eps=model.norm_eps,
        rope_parameters=rope,
        rope_interleave=interleave,
        attention_bias=False,
    )
    config._attn_implementation = "eager"
    attention = deepseek.DeepseekV3Attention(config, 0).double()
    attention.load_state_dict({oracle_name(name): torch.tensor(value).double() for name, value in params.items()})
    for norm in filter(None, (attention.q_a_layernorm, attention.kv_a_layernorm)):
        norm.variance_epsilon = model.norm_eps  # its default is another
    return attention, deepseek.DeepseekV3RotaryEmbedding(config)


def oracle_output(attention: Any, rotary: Any, x: Any) -> Any:
    length = x.shape[1]
    mask = torch.full((length, length), -torch.inf, dtype=x.dtype).triu(1)[None, None]
    return attention(x, rotary(x, torch.arange(length)[None]), mask)[0]


def test_output_equals_transformers(backend: str, form: tuple[ModelConfig, np.ndarray]):
    model, x = form
    params = one_mixer.tensors(model)
    with torch.no_grad():
        expected = oracle_output(*oracle(model, params), torch.tensor(x).double()).numpy()
    got = {how: one_mixer.output(backend, model, params, x, how) for how in ("plain", "auto")}
    got["definition"] = one_mixer.reference_output(model, params, x)
    demand(Difference(how, largest(value, expected), FLOAT32.oracle) for how, value in got.items())


def test_every_gradient_equals_torch_autograd(backend: str, form: tuple[ModelConfig, np.ndarray]):
    model, x = form
    params, outer = one_mixer.tensors(model), one_mixer.normal(model, *x.shape[:2], seed=1)
    attention, rotary = oracle(model, params)
    leaf = torch.tensor(x).double().requires_grad_()
    (oracle_output(attention, rotary, leaf) * torch.tensor(outer)).sum().backward()
    by_name = {name: parameter.grad.numpy() for name, parameter in attention.named_parameters()}
    expected = {name: by_name[oracle_name(name)] for name in params} | {"x": leaf.grad.numpy()}
    if x.shape[1] == 1:  # one position attends to itself only: what turns and scores has no gradient
        expected = {name: value for name, value in expected.items() if np.abs(value).max() > 1e-12}
    got = one_mixer.gradients(backend, model, params, x, outer)
    demand(tensors({name: got[name] for name in expected}, expected, FLOAT32.oracle, "gradient of "))


def test_interleaved_weights_of_deepseek_are_ours_in_another_order(backend: str):
    """The pairs (0, 1), (2, 3), … of each head's rotary rows are our halves: even rows first, then odd."""
    model, x = form_of("q rank")
    params, P, N = one_mixer.tensors(model), rope_dim(model), model.head_dim
    theirs, order = dict(params), np.empty(P, int)
    order[::2], order[1::2] = np.arange(P // 2), np.arange(P // 2, P)
    query = params["q_b_proj.weight"].reshape(model.heads, N + P, -1)
    theirs["q_b_proj.weight"] = np.concatenate([query[:, :N], query[:, N:][:, order]], axis=1).reshape(params["q_b_proj.weight"].shape)
    theirs["kv_a_proj.weight"] = np.concatenate([params["kv_a_proj.weight"][:-P], params["kv_a_proj.weight"][-P:][order]])
    with torch.no_grad():
        expected = oracle_output(*oracle(model, theirs, interleave=True), torch.tensor(x).double()).numpy()
    demand([Difference("output", largest(one_mixer.output(backend, model, params, x), expected), FLOAT32.oracle)])


@pytest.mark.parametrize("changed", ["norm_eps", "rope_base", "rope_factor", "kv_a_norm.weight", "kv_b_proj.weight"])
def test_a_mixer_that_is_off_is_caught_by_the_oracle(backend: str, changed: str):
    model, x = form_of("yarn and q rank")
    params, wrong = one_mixer.tensors(model), model
    if changed in params:
        wrong_params = {**params, changed: params[changed] * np.float32(1.001)}
    else:
        factor = 20 if changed == "norm_eps" else 1.01
        wrong, wrong_params = dataclasses.replace(model, **{changed: getattr(model, changed) * factor}), params
    with torch.no_grad():
        expected = oracle_output(*oracle(model, params), torch.tensor(x).double()).numpy()
    with pytest.raises(Mismatch):
        demand([Difference("output", largest(one_mixer.output(backend, wrong, wrong_params, x), expected), FLOAT32.oracle)])
