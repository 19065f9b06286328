"""The outside: rwkv is RWKV-7's time mix as its author's package computes it, and its core is fla's DPLR recurrence, weights alike.

Outputs and every gradient, over two layers, since the second reads the first one's v. The oracles compute in float32 and token by
token, so their own rounding is in the differences; the package writes e^-1/2 as 0.606531.
"""

import importlib.util
import pathlib
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from smedjan_common.config import ModelConfig
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.params import initial_params
from smedjan_common.reference import model as reference_model
from smedjan_common.reference import rwkv as reference
from tests.conformance import subjects
from tests.conformance.alone import value_and_gradients
from tests.conformance.compare import Difference, Mismatch, demand, largest, tensors
from tests.conformance.gates import FLOAT32

torch = pytest.importorskip("torch", reason="torch is not installed (extra: oracle)")
pytestmark = [pytest.mark.oracle, pytest.mark.xdist_group("oracle"), pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")]

GRADIENT = MIXERS["rwkv"].tolerance.gradient
LAYERS = ("layers.0.mixer", "layers.1.mixer")
SHAPES: dict[str, tuple[int, int, dict[str, Any]]] = {  # positions, chunk, model
    "one position": (1, 64, {"dim": 64, "rwkv_head_dim": 16}),
    "one chunk": (17, 64, {"dim": 64, "rwkv_head_dim": 16}),
    "chunks that do not divide": (75, 16, {"dim": 96, "rwkv_head_dim": 32}),
    "heads of 64": (70, 32, {"dim": 128}),
}
CORES = {  # positions, chunk, head size, with a state that came before, log decay
    "one chunk": (17, 64, 8, False, None),
    "chunks that do not divide": (75, 16, 16, True, None),
    "strongest decay in the largest chunks": (256, 128, 16, True, -0.606),
    "no decay": (130, 64, 32, True, -1e-6),
}


@pytest.fixture(scope="module")
def package() -> Any:
    """The module rwkv.model: it reads its settings from the environment when it is imported."""
    pytest.importorskip("rwkv", reason="rwkv is not installed (extra: oracle)")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RWKV_V7_ON", "1"), ("RWKV_JIT_ON", "0"), ("RWKV_CUDA_ON", "0")):
            patch.setenv(name, value)
        return importlib.import_module("rwkv.model")


@pytest.fixture(scope="module")
def naive() -> ModuleType:
    """fla's plain recurrence, loaded by its path: the package itself needs a GPU."""
    found = importlib.util.find_spec("fla")
    if found is None or not found.submodule_search_locations:
        pytest.skip("fla-core is not installed (extra: oracle)")
    path = pathlib.Path(found.submodule_search_locations[0], "ops", "generalized_delta_rule", "dplr", "naive.py")
    spec = importlib.util.spec_from_file_location("fla_dplr_naive", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model_of(shape: str) -> ModelConfig:
    return ModelConfig.build(vocab_size=60, layers=2, heads=4, ffn_dim=64, mixer=("rwkv",), **SHAPES[shape][2])


def tensors_of(config: ModelConfig) -> subjects.Params:
    """The tensors of both layers; what starts constant is moved, r, k and v are of order one, so that a forgotten tensor shows."""
    rng, wider = np.random.default_rng(2), {"r_proj": 4, "k_proj": 10, "v_proj": 4}
    start = {n: v * np.float32(wider.get(n.split(".")[3], 1)) for n, v in initial_params(config, 1).items() if ".mixer." in n}
    return {n: v if np.ptp(v) else (v + 0.2 * rng.standard_normal(v.shape)).astype(np.float32) for n, v in start.items()}


def inputs(shape: str) -> tuple[np.ndarray, np.ndarray]:
    """x [B, T, D], and the weights of the outputs of both layers in the sum that is differentiated."""
    rng, (T, _, options) = np.random.default_rng(3), SHAPES[shape]
    return rng.standard_normal((2, T, options["dim"])).astype(np.float32), rng.standard_normal((2, 2, T, options["dim"])).astype(np.float32)


def oracle(package: Any, config: ModelConfig, params: dict[str, Any], x_BxTxD: Any, one_by_one: bool) -> Any:
    """Both layers of the author's package on the same x, [2, B, T, D], a sequence or a token at a time.

    Only the latter has a gradient: the package writes a sequence's outputs in place.
    """
    N, H = config.rwkv_head_dim, config.dim // config.rwkv_head_dim
    empty, rows = torch.zeros(0), []
    for x_TxD in x_BxTxD:
        v_first, outputs = [empty] * len(x_TxD), []
        for layer, at in enumerate(LAYERS):
            mine = reference_model.under(params, f"{at}.")
            low_rank = [mine.get(n, mine.get(f"{n}.weight", empty)) for n in "w0 w1 w2 a0 a1 a2 v0 v1 v2 g1 g2".split()]
            args = [mine[f"x_{n}"] for n in "rwkvag"] + [each.T if each.ndim == 2 else each for each in low_rank]
            args += [mine["k_k"], mine["k_a"], mine["r_k"].flatten(), *(mine[f"{n}_proj.weight"].T for n in "rkvo")]
            args += [mine["ln_x.weight"], mine["ln_x.bias"]]
            last, S = torch.zeros(config.dim), torch.zeros(H, N, N)
            if one_by_one:
                ys = []
                for t, x in enumerate(x_TxD):
                    y, last, S, v_first[t] = package.RWKV_x070_TMix_one(layer, H, N, x, last, v_first[t], S, *args)
                    ys.append(y)
                outputs.append(torch.stack(ys))
            else:
                y, _, _, v_first = package.RWKV_x070_TMix_seq(layer, H, N, x_TxD, last, empty if layer == 0 else v_first, S, *args)
                outputs.append(y)
        rows.append(torch.stack(outputs))
    return torch.stack(rows, dim=1)


def ours(backend: str, config: ModelConfig, params: subjects.Params, x: np.ndarray, weight: np.ndarray, chunk: int) -> Any:
    """Both layers' outputs, and the gradients of their sum weighted by `weight`, of the input too."""
    mixer_class = subjects.module(backend, "mixers.rwkv").Rwkv
    context = subjects.module(backend, "modules").Context(None, None, None, chunk)

    def forward(values: Any) -> list[Any]:
        outputs, carried = [], {}
        for at in LAYERS:
            y, carried = mixer_class(config, values, at)(values["x"], context, carried)
            outputs.append(y)
        return outputs

    outputs, grads = value_and_gradients(backend, forward, {**params, "x": x}, list(weight))
    return np.stack(outputs), grads


def definition(config: ModelConfig, params: subjects.Params, x: np.ndarray) -> np.ndarray:
    wide, carried = {name: value.astype(np.float64) for name, value in params.items()}, {}
    return np.stack([reference.forward(config, reference_model.under(wide, f"{at}."), x.astype(np.float64), carried) for at in LAYERS])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_definition_equals_the_package_of_the_author(package: Any, shape: str):
    config = model_of(shape)
    params, (x, _) = tensors_of(config), inputs(shape)
    with torch.no_grad():
        expected = oracle(package, config, {n: torch.tensor(v) for n, v in params.items()}, torch.tensor(x), False).numpy()
    demand([Difference("output", largest(definition(config, params, x), expected), FLOAT32.oracle)])


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_every_gradient_equal_the_package_of_the_author(backend: str, package: Any, shape: str):
    config = model_of(shape)
    params, (x, weight) = tensors_of(config), inputs(shape)
    theirs = {name: torch.tensor(value, requires_grad=True) for name, value in {**params, "x": x}.items()}
    expected = oracle(package, config, theirs, theirs["x"], True)
    (expected * torch.tensor(weight)).sum().backward()
    got, grads = ours(backend, config, params, x, weight, SHAPES[shape][1])
    wanted = {name: np.zeros_like(params[name]) if each.grad is None else each.grad.numpy() for name, each in theirs.items()}
    demand(
        [
            Difference("outputs", largest(got, expected.detach().numpy()), FLOAT32.oracle),
            *tensors(grads, wanted, GRADIENT, "gradient of "),
        ]
    )


@pytest.mark.parametrize("shape", CORES)
def test_the_core_equals_the_recurrence_of_fla(backend: str, naive: ModuleType, shape: str):
    T, C, K, has_state, log_decay = CORES[shape]
    rng, H = np.random.default_rng(T), 2
    r, k, v = rng.standard_normal((3, 2, H, T, K)).astype(np.float32)
    kk = rng.standard_normal((2, H, T, K)).astype(np.float32)
    kk[:, :, 3::5] = kk[:, :, :1]
    kk /= np.linalg.norm(kk, axis=-1, keepdims=True)
    w = np.full_like(r, log_decay) if log_decay else -rng.uniform(0, 0.606, r.shape).astype(np.float32)
    names = ("r", "w", "k", "v", "a", "b")
    host = dict(zip(names, (r, w, k, v, -kk, kk * rng.uniform(0, 1, kk.shape).astype(np.float32)), strict=True))
    host["state"] = rng.standard_normal((2, H, K, K)).astype(np.float32) * has_state
    weights = [rng.standard_normal(each.shape).astype(np.float32) for each in (v, host["state"])]
    theirs = {name: torch.tensor(value, requires_grad=True) for name, value in host.items()}
    q = theirs["r"] * K**0.5  # fla scales it down
    expected = naive.dplr_recurrence(q, theirs["k"], theirs["v"], theirs["a"], theirs["b"], theirs["w"], theirs["state"].mT)
    sum((out * torch.tensor(weight)).sum() for out, weight in zip((expected[0], expected[1].mT), weights, strict=True)).backward()

    core, swap = subjects.module(backend, "mixers.rwkv").dplr_delta_rule, backend == "jax"

    def rule(arrays: Any) -> tuple[Any, Any]:
        o, state = core(tuple(arrays[n].swapaxes(1, 2) if swap else arrays[n] for n in names), arrays["state"], None, min(C, T))
        return (o.swapaxes(1, 2) if swap else o), state

    got, grads = value_and_gradients(backend, rule, host, weights)
    pairs = zip(("output", "state"), got, (expected[0], expected[1].mT), strict=True)
    demand(
        [
            *(Difference(name, largest(ours, want.detach().numpy()), FLOAT32.oracle) for name, ours, want in pairs),
            *tensors(grads, {name: each.grad.numpy() for name, each in theirs.items()}, GRADIENT, "gradient of "),
        ]
    )


@pytest.mark.parametrize("changed", ["x_k", "w0", "a2.weight", "v0", "k_a", "r_k", "ln_x.weight", "g1.weight", "k_proj.weight"])
def test_a_layer_that_is_off_is_caught_by_the_oracle(package: Any, changed: str):
    config = model_of("one chunk")
    params, (x, _) = tensors_of(config), inputs("one chunk")
    with torch.no_grad():
        expected = oracle(package, config, {n: torch.tensor(v) for n, v in params.items()}, torch.tensor(x), False).numpy()
    name = f"{LAYERS[1]}.{changed}"
    params[name] = params[name] * np.float32(1.001)
    with pytest.raises(Mismatch):
        demand([Difference("output", largest(definition(config, params, x), expected), FLOAT32.oracle)])
