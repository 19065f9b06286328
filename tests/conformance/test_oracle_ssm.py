"""The outside: the mixer ssm is Mamba-2 as transformers and mlx-lm have it, weights alike.

Output, and gradients of the input and of every tensor, against transformers' Mamba2Mixer (torch, CPU); the core by itself, with a state
before and after, against its chunked scan; output against mlx-lm's block. They compute in float32, so their rounding is in the differences.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest

from smedjan_common.config import ModelConfig
from smedjan_common.model.mixers.ssm import heads, inner_dim
from smedjan_common.model.params import initial_params
from tests.conformance import one_mixer as alone
from tests.conformance import subjects
from tests.conformance.compare import Difference, Mismatch, demand, largest, tensors
from tests.conformance.gates import FLOAT32

torch = pytest.importorskip("torch", reason="torch is not installed (extra: oracle)")
mamba2 = pytest.importorskip("transformers.models.mamba2.modeling_mamba2", reason="transformers is not installed (extra: oracle)")

pytestmark = [pytest.mark.oracle, pytest.mark.xdist_group("oracle")]

FORMS: dict[str, tuple[dict[str, Any], int, int]] = {  # options, batch, length
    "one group": ({"ssm_state": 8, "ssm_head_dim": 16}, 2, 17),
    "one token": ({"ssm_state": 8, "ssm_head_dim": 16}, 3, 1),
    "two groups": ({"ssm_state": 12, "ssm_head_dim": 16, "ssm_groups": 2}, 2, 30),
    "three taps, wide state": ({"ssm_state": 64, "ssm_head_dim": 8, "conv_width": 3}, 1, 40),
    "not expanded, four groups": ({"ssm_state": 5, "ssm_head_dim": 4, "ssm_expand": 1, "ssm_groups": 4}, 2, 9),
}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> tuple[ModelConfig, np.ndarray]:
    """A model and an input."""
    return form_of(request.param)


def form_of(name: str) -> tuple[ModelConfig, np.ndarray]:
    options, batch, length = FORMS[name]
    model = alone.config("ssm", **options)
    return model, alone.normal(model, batch, length)


def oracle_names(model: ModelConfig) -> dict[str, str]:
    """Our names -> transformers' and mlx-lm's."""
    return {name: name.replace("conv.", "conv1d.").replace("conv_bias", "conv1d.bias") for name in alone.tensors(model)}


def oracle(model: ModelConfig, params: subjects.Params) -> Any:
    """transformers' mixer with these weights."""
    config = mamba2.Mamba2Config(
        hidden_size=model.dim,
        num_heads=heads(model),
        head_dim=model.ssm_head_dim,
        state_size=model.ssm_state,
        expand=model.ssm_expand,
        n_groups=model.ssm_groups,
        conv_kernel=model.conv_width,
        num_hidden_layers=1,
        layer_norm_epsilon=model.norm_eps,
        chunk_size=16,
        use_bias=False,
        use_conv_bias=True,
        hidden_act="silu",
        time_step_limit=(0.0, float("inf")),
    )
    mixer = mamba2.Mamba2Mixer(config, 0)
    names = oracle_names(model)
    weights = {names[name]: torch.tensor(value[:, None] if name == "conv.weight" else value) for name, value in params.items()}
    mixer.load_state_dict(weights)
    return mixer


def test_output_equals_transformers(backend: str, form: tuple[ModelConfig, np.ndarray]):
    model, x = form
    params = alone.tensors(model)
    with torch.no_grad():
        expected = oracle(model, params)(torch.tensor(x)).numpy()
    got = {"output": alone.output(backend, model, params, x), "definition": alone.reference_output(model, params, x)}
    demand(Difference(how, largest(value, expected), FLOAT32.oracle) for how, value in got.items())


def test_every_gradient_equals_torch_autograd(backend: str, form: tuple[ModelConfig, np.ndarray]):
    model, x = form
    params, outer, names = alone.tensors(model), alone.normal(model, *x.shape[:2], seed=1), oracle_names(model)
    mixer, leaf = oracle(model, params), torch.tensor(x, requires_grad=True)
    (mixer(leaf) * torch.tensor(outer)).sum().backward()
    by_name = {name: parameter.grad for name, parameter in mixer.named_parameters()}
    expected = {name: by_name[names[name]].numpy().reshape(value.shape) for name, value in params.items()} | {"x": leaf.grad.numpy()}
    if x.shape[1] == 1:
        del expected["A_log"]  # nothing decays yet
    got = alone.gradients(backend, model, params, x, outer)
    demand(tensors({name: got[name] for name in expected}, expected, FLOAT32.oracle, "gradient of "))


def test_output_equals_mlx_lm(backend: str):
    block_of = pytest.importorskip("mlx_lm.models.mamba2", reason="mlx-lm is not installed (extra: oracle)")
    mx = pytest.importorskip("mlx.core", reason="mlx is not installed")
    model, x = form_of("one group")
    params, names = alone.tensors(model), oracle_names(model)
    sizes = {"num_heads": heads(model), "head_dim": model.ssm_head_dim, "hidden_size": model.dim, "intermediate_size": inner_dim(model)}
    block = block_of.Mamba2Block(
        block_of.ModelArgs(
            model_type="mamba2",
            vocab_size=model.vocab_size,
            state_size=model.ssm_state,
            num_hidden_layers=1,
            layer_norm_epsilon=model.norm_eps,
            conv_kernel=model.conv_width,
            n_groups=1,
            use_bias=False,
            use_conv_bias=True,
            tie_word_embeddings=True,
            time_step_limit=(0.0, float("inf")),
            time_step_rank="auto",
            **sizes,
        ),
        0,
    )
    weights = [(names[name], mx.array(value[..., None] if name == "conv.weight" else value)) for name, value in params.items()]
    block.load_weights(weights)
    demand([Difference("output", largest(alone.output(backend, model, params, x), np.asarray(block(mx.array(x), None))), FLOAT32.oracle)])


@pytest.mark.parametrize("T", [1, 40, 130])
def test_core_equals_transformers_scan_with_a_state_before_and_after(backend: str, T: int):
    """Many heads read one key and query: B and C of their group. The steps span three orders of magnitude."""
    rng, (B, H, P, G, N) = np.random.default_rng(T), (2, 6, 5, 2, 8)
    x, key, query = (rng.standard_normal((B, T, *shape)).astype(np.float32) for shape in ((H, P), (G, N), (G, N)))
    dt, A = np.exp(rng.uniform(-6, 1, (B, T, H))).astype(np.float32), -rng.uniform(1, 16, H).astype(np.float32)
    state = rng.standard_normal((B, H, P, N)).astype(np.float32)
    arrays = (torch.tensor(array) for array in (x, dt, A, key, query))
    y, after = mamba2.mamba2_chunk_scan(*arrays, chunk_size=32, initial_states=torch.tensor(state), return_final_states=True)

    core, grouped = subjects.module(backend, "mixers.decay").scalar_decay, (B, T, G, H // G)
    value, decay = (x * dt[..., None]).reshape(*grouped, P), (A * dt).reshape(grouped)
    before = state.swapaxes(-1, -2).reshape(B, G, H // G, N, P)
    array = subjects.framework(backend).array
    got = core(array(query[:, :, :, None]), array(key), array(value), array(decay), 16, array(before), None)
    demand(
        [
            Difference("output", largest(np.asarray(got[0]).reshape(y.shape), y.numpy()), FLOAT32.oracle),
            Difference("state", largest(np.asarray(got[1]).reshape(B, H, N, P).swapaxes(-1, -2), after.numpy()), FLOAT32.oracle),
        ]
    )


def test_initial_values_are_the_papers():
    """A uniform in 1 to 16, steps log-uniform in 0.001 to 0.1, D one, convolution as torch begins its own."""
    params = initial_params(ModelConfig.build(vocab_size=64, dim=512, layers=1, heads=8, mixer=("ssm",), ssm_head_dim=2), 3)
    mixer = {name.removeprefix("layers.0.mixer."): value for name, value in params.items()}
    rates, steps = np.exp(mixer["A_log"]), torch.nn.functional.softplus(torch.tensor(mixer["dt_bias"])).numpy()
    for values, low, high in ((rates, 1.0, 16.0), (np.log(steps), np.log(1e-3), np.log(1e-1)), (mixer["conv.weight"], -0.5, 0.5)):
        assert low - 1e-3 <= values.min() < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < values.max() <= high + 1e-3
        assert abs(values.mean() - (low + high) / 2) < 0.1 * (high - low)
    assert (mixer["D"] == 1).all()


@pytest.mark.parametrize("changed", ["norm_eps", "A_log", "dt_bias", "D", "conv_bias", "norm.weight"])
def test_a_mixer_that_is_off_is_caught_by_the_oracle(backend: str, changed: str):
    model, x = form_of("two groups")
    params, wrong = alone.tensors(model), model
    wrong_params = dict(params)
    if changed in params:
        wrong_params[changed] = params[changed] * np.float32(1.001)
    else:
        wrong = dataclasses.replace(model, norm_eps=model.norm_eps * 1.1)
    with torch.no_grad():
        expected = oracle(model, params)(torch.tensor(x)).numpy()
    with pytest.raises(Mismatch):
        demand([Difference("output", largest(alone.output(backend, wrong, wrong_params, x), expected), FLOAT32.oracle)])
