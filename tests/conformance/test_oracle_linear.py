"""The outside: the mixer linear is fla's linear attention: simple GLA, RetNet, and linear attention with and without its denominator.

fla-core brings the definitions as plain torch in naive.py files, loaded by path because its package asks for a GPU. They compute in
float32, so their rounding is in the differences. The core alone is compared too: with a state before and after, over many chunks.
"""

import importlib.util
import pathlib
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from smedjan_common.config import ModelConfig
from tests.conformance import one_mixer as alone
from tests.conformance import subjects
from tests.conformance.compare import Difference, Mismatch, demand, largest, tensors
from tests.conformance.gates import FLOAT32

torch = pytest.importorskip("torch", reason="torch is not installed (extra: oracle)")
pytest.importorskip("einops", reason="einops is not installed (extra: oracle)")
FLA = importlib.util.find_spec("fla")
if FLA is None:
    pytest.skip("fla-core is not installed (extra: oracle)", allow_module_level=True)

pytestmark = [pytest.mark.oracle, pytest.mark.xdist_group("oracle")]

NO_DECAY = {"linear_decay": "none"}
DIVIDED = {"linear_feature_map": "elu1", "linear_normalizer": "denominator"}
FORMS: dict[str, tuple[dict[str, Any], int, int]] = {  # options, batch, length
    "simple gla": ({}, 2, 17),
    "simple gla, one token": ({}, 3, 1),
    "simple gla, grouped heads": ({"kv_heads": 2}, 2, 30),
    "simple gla of positive features": ({"linear_feature_map": "elu1", "heads": 2}, 1, 21),
    "retnet": ({"linear_decay": "fixed"}, 2, 40),
    "retnet, wide heads": ({"linear_decay": "fixed", "heads": 2, "dim": 48}, 1, 33),
    "linear attention": (NO_DECAY, 2, 17),
    "linear attention, divided": ({**NO_DECAY, **DIVIDED}, 2, 17),
    "linear attention, divided, grouped heads": ({**NO_DECAY, **DIVIDED, "kv_heads": 1}, 1, 29),
    "simple gla, divided": (DIVIDED, 2, 23),
}


def naive(folder: str) -> ModuleType:
    """fla's ops/{folder}/naive.py."""
    assert FLA is not None
    assert FLA.submodule_search_locations
    path = pathlib.Path(FLA.submodule_search_locations[0]) / "ops" / folder / "naive.py"
    spec = importlib.util.spec_from_file_location(f"fla_naive_{folder}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> tuple[ModelConfig, np.ndarray]:
    """A model and an input."""
    return form_of(request.param)


def form_of(name: str) -> tuple[ModelConfig, np.ndarray]:
    options, batch, length = FORMS[name]
    model = alone.config("linear", **options)
    return model, alone.normal(model, batch, length)


def oracle_output(model: ModelConfig, params: dict[str, Any], x: Any) -> Any:
    """fla's operator between torch's own projections, norm and gate."""

    def heads(name: str, count: int) -> Any:
        return (x @ params[f"{name}.weight"].T).unflatten(-1, (count, model.head_dim))

    query, key, value = heads("q_proj", model.heads), heads("k_proj", model.kv_heads), heads("v_proj", model.kv_heads)
    if model.linear_feature_map == "elu1":
        query, key = torch.nn.functional.elu(query) + 1, torch.nn.functional.elu(key) + 1
    key, value = (array.repeat_interleave(model.heads // model.kv_heads, dim=2) for array in (key, value))
    mixed = operator(model, params, x, query, key, value)
    if model.linear_normalizer == "rmsnorm":
        mixed = torch.nn.functional.rms_norm(mixed, (model.head_dim,), params["norm.weight"], model.norm_eps)
    gate = torch.nn.functional.silu(x @ params["gate_proj.weight"].T)
    return (mixed.flatten(2) * gate) @ params["o_proj.weight"].T


def operator(model: ModelConfig, params: dict[str, Any], x: Any, query: Any, key: Any, value: Any) -> Any:
    divided = model.linear_normalizer == "denominator"
    if model.linear_decay == "none":
        return naive("linear_attn").naive_recurrent_linear_attn(query, key, value, normalize=divided)[0]
    if model.linear_decay == "fixed":
        return naive("retention").naive_retention(*(array.transpose(1, 2) for array in (query, key, value))).transpose(1, 2)
    decay = torch.nn.functional.logsigmoid(x @ params["decay_proj.weight"].T + params["decay_bias"]) / 16
    decay = decay.repeat_interleave(model.heads // model.kv_heads, dim=2)
    gla = naive("simple_gla").naive_recurrent_simple_gla
    mixed = gla(query, key, value, decay)[0]
    return mixed / gla(query, key, torch.ones_like(value[..., :1]), decay)[0] if divided else mixed


def leaves(params: subjects.Params) -> dict[str, Any]:
    return {name: torch.tensor(value, requires_grad=True) for name, value in params.items()}


def test_output_equals_fla(backend: str, form: tuple[ModelConfig, np.ndarray]):
    model, x = form
    params = alone.tensors(model)
    expected = oracle_output(model, leaves(params), torch.tensor(x)).detach().numpy()
    got = {"output": alone.output(backend, model, params, x), "definition": alone.reference_output(model, params, x)}
    demand(Difference(how, largest(value, expected), FLOAT32.oracle) for how, value in got.items())


def test_every_gradient_equals_torch_autograd(backend: str, form: tuple[ModelConfig, np.ndarray]):
    model, x = form
    params, outer = alone.tensors(model), alone.normal(model, *x.shape[:2], seed=1)
    tree = leaves({**params, "x": x})
    (oracle_output(model, tree, tree["x"]) * torch.tensor(outer)).sum().backward()
    names = {"x", *params}
    if x.shape[1] == 1:  # nothing decays, and o is a multiple of v whose factor the norm takes away: these gradients are rounding
        names -= {"q_proj.weight", "k_proj.weight", "decay_proj.weight", "decay_bias"}
    expected = {name: tree[name].grad.numpy() for name in names}
    got = alone.gradients(backend, model, params, x, outer)
    demand(tensors({name: got[name] for name in expected}, expected, FLOAT32.oracle, "gradient of "))


@pytest.mark.parametrize("changed", ["q_proj.weight", "gate_proj.weight", "decay_bias", "norm.weight"])
def test_a_mixer_that_is_off_is_caught_by_the_oracle(backend: str, changed: str):
    model, x = form_of("simple gla")
    params = alone.tensors(model)
    wrong = {**params, changed: params[changed].copy()}
    wrong[changed][:1] *= np.float32(1.01 if changed == "decay_bias" else 1.001)  # the decay is a sixteenth of a logarithm: it moves little
    expected = oracle_output(model, leaves(params), torch.tensor(x)).detach().numpy()
    with pytest.raises(Mismatch):
        demand([Difference("output", largest(alone.output(backend, model, wrong, x), expected), FLOAT32.oracle)])


# the core by itself


CORES = {  # positions, chunk, how many chunks are one product, a state before
    "one position": (1, 64, 32, True),
    "one chunk": (40, 64, 32, False),
    "chunks that do not divide": (75, 16, 32, True),
    "products of products": (75, 4, 3, True),
    "chunks of one position": (29, 1, 2, False),
}


def core_arrays(T: int) -> dict[str, np.ndarray]:
    """q, k [B, T, H, K], v [B, T, H, V], decays from almost none to almost all, a state."""
    rng, (B, H, K, V) = np.random.default_rng(T), (2, 3, 8, 5)
    q, k, v = (rng.standard_normal((B, T, H, size)).astype(np.float32) for size in (K, K, V))
    g = -np.exp(rng.uniform(-7, 2, (B, T, H))).astype(np.float32)
    return {"q": q, "k": k, "v": v, "g": g, "state": rng.standard_normal((B, H, K, V)).astype(np.float32)}


def our_core(backend: str, arrays: dict[str, Any], chunk: int, before: bool) -> tuple[Any, Any]:
    """Our core in fla's convention: one query and one value per key."""
    q, k, v, g = (arrays[name] for name in "qkvg")
    core = subjects.module(backend, "mixers.decay").scalar_decay
    o, state = core(q[:, :, :, None], k, v[:, :, :, None], g[..., None], chunk, arrays["state"][:, :, None] if before else None, None)
    return o[:, :, :, 0, 0], state[:, :, 0]


@pytest.mark.parametrize("form", CORES)
def test_core_equals_fla_with_a_state_before_and_after(backend: str, form: str, monkeypatch: pytest.MonkeyPatch):
    T, chunk, span, before = CORES[form]
    monkeypatch.setattr(subjects.module(backend, "mixers.decay"), "SPAN", span)
    arrays, rng = core_arrays(T), np.random.default_rng(5)
    outer = {name: rng.standard_normal(arrays[like].shape).astype(np.float32) for name, like in (("o", "v"), ("S", "state"))}

    tree = leaves(arrays)
    o, state = naive("simple_gla").naive_recurrent_simple_gla(
        *(tree[name] for name in "qkvg"), scale=1.0, initial_state=tree["state"] if before else None
    )
    ((o * torch.tensor(outer["o"])).sum() + (state * torch.tensor(outer["S"])).sum()).backward()
    expected = {name: leaf.grad.numpy() for name, leaf in tree.items() if leaf.grad is not None}

    framework = subjects.framework(backend)
    weight = subjects.on_device(backend, outer)

    def loss(arrays: dict[str, Any]) -> Any:
        o, state = our_core(backend, arrays, chunk, before)
        return (o * weight["o"]).sum() + (state * weight["S"]).sum()

    given = subjects.on_device(backend, arrays)
    got = our_core(backend, given, chunk, before)
    slope = subjects.on_host(framework.compile(framework.grad(loss))(given))
    demand(
        [
            Difference("output", largest(np.asarray(got[0]), o.detach().numpy()), FLOAT32.oracle),
            Difference("state", largest(np.asarray(got[1]), state.detach().numpy()), FLOAT32.oracle),
            *tensors({name: slope[name] for name in expected}, expected, FLOAT32.oracle, "gradient of "),
        ]
    )
