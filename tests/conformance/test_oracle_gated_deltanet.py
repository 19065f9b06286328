"""The outside: gated-deltanet is transformers' Qwen3-Next: its chunked and its recurrent delta rule, and its whole layer, weights alike.

Outputs and every gradient. transformers computes in float32, so its own rounding is in the differences.
"""

from typing import Any

import numpy as np
import pytest

from smedjan_common.config import ModelConfig
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.mixers.gated_deltanet import heads
from smedjan_common.model.params import initial_params
from smedjan_common.reference import gated_deltanet as reference
from smedjan_common.reference import model as reference_model
from tests.conformance import subjects
from tests.conformance.alone import value_and_gradients
from tests.conformance.compare import Difference, Mismatch, demand, largest, tensors
from tests.conformance.gates import FLOAT32

torch = pytest.importorskip("torch", reason="torch is not installed (extra: oracle)")
qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next", reason="transformers is not installed (extra: oracle)")

pytestmark = [pytest.mark.oracle, pytest.mark.xdist_group("oracle")]

NAME, BATCH = "layers.1.mixer", 2
GRADIENT = MIXERS["gated-deltanet"].tolerance.gradient
RULES = {"chunked": qwen.torch_chunk_gated_delta_rule, "recurrent": qwen.torch_recurrent_gated_delta_rule}
CORES = {  # positions, chunk, key and value size, with a state that came before
    "one position": (1, 64, 8, False),
    "one chunk": (17, 64, 16, False),
    "chunks that do not divide": (75, 16, 32, True),
    "whole chunks": (128, 64, 24, True),
}
LAYERS: dict[str, tuple[int, int, dict[str, Any]]] = {  # positions, chunk, model
    "heads alone": (40, 16, {"dim": 64, "heads": 4}),
    "two value heads a key": (33, 32, {"dim": 64, "heads": 4, "kv_heads": 2}),
    "heads of its own": (
        33,
        32,
        {"dim": 48, "heads": 3, **{"delta_key_heads": 2, "delta_value_heads": 6}, "delta_key_size": 12, "delta_value_size": 8},
    ),
    "one key head": (70, 64, {"dim": 96, "heads": 3, "kv_heads": 1, "conv_width": 3}),
}


def core_arrays(T: int, K: int) -> dict[str, np.ndarray]:
    """Inputs of the rule, [B, T, H, …]: unit keys some of which repeat, decays from almost none to almost all."""
    rng, H = np.random.default_rng(T), 3
    q, k, v = rng.standard_normal((3, BATCH, T, H, K)).astype(np.float32)
    k[:, 5::7] = k[:, :1]
    q, k = (each / np.linalg.norm(each, axis=-1, keepdims=True) for each in (q, k))
    g = -np.exp(rng.uniform(-7, 2, (BATCH, T, H))).astype(np.float32)
    beta = rng.uniform(0, 1, (BATCH, T, H)).astype(np.float32)
    return {"q": q, "k": k, "v": v, "g": g, "beta": beta, "state": rng.standard_normal((BATCH, H, K, K)).astype(np.float32)}


def our_rule(backend: str, arrays: Any, C: int) -> tuple[Any, Any]:
    """Our core in the oracle's convention: positions before heads, q not yet scaled, the state [K, V]."""
    q = arrays["q"] * arrays["q"].shape[-1] ** -0.5
    inputs = (q, *(arrays[name] for name in ("k", "v", "g", "beta")))
    if backend == "mlx":
        inputs = tuple(each.swapaxes(1, 2) for each in inputs)
    o, state = subjects.module(backend, "mixers.gated_deltanet").gated_delta_rule(inputs, arrays["state"].swapaxes(-1, -2), None, C)
    return (o.swapaxes(1, 2) if backend == "mlx" else o), state.swapaxes(-1, -2)


@pytest.mark.parametrize("shape", CORES)
def test_the_rule_equals_both_of_transformers(backend: str, shape: str):
    T, C, K, has_state = CORES[shape]
    host = core_arrays(T, K)
    if not has_state:
        host["state"] *= 0
    rng = np.random.default_rng(1)
    weights = [rng.standard_normal(host[name].shape).astype(np.float32) for name in ("v", "state")]
    got, grads = value_and_gradients(backend, lambda arrays: our_rule(backend, arrays, min(C, T)), host, weights)
    for rule, function in RULES.items():
        theirs = {name: torch.tensor(value, requires_grad=True) for name, value in host.items()}
        named = {"query": theirs["q"], "key": theirs["k"], "value": theirs["v"], "g": theirs["g"], "beta": theirs["beta"]}
        expected = function(**named, initial_state=theirs["state"], output_final_state=True)
        sum((out * torch.tensor(weight)).sum() for out, weight in zip(expected, weights, strict=True)).backward()
        pairs = zip(("output", "state"), got, expected, strict=True)
        wanted = {name: each.grad.numpy() for name, each in theirs.items()}
        demand(
            [
                *(Difference(f"{rule} {name}", largest(ours, want.detach().numpy()), FLOAT32.oracle) for name, ours, want in pairs),
                *tensors(grads, wanted, GRADIENT, f"{rule} gradient of "),
            ]
        )


def model_of(layer: str) -> ModelConfig:
    return ModelConfig.build(vocab_size=60, layers=2, ffn_dim=64, mixer=("gated-deltanet",), init_std=0.15, **LAYERS[layer][2])


def tensors_of(config: ModelConfig) -> subjects.Params:
    params = reference_model.under(initial_params(config, 1), f"{NAME}.")
    params["norm.weight"] = np.random.default_rng(2).uniform(0.5, 1.5, config.delta_value_dim).astype(np.float32)
    return params


def order(config: ModelConfig, names: str, sizes: list[int]) -> np.ndarray:
    """Rows of our matrices `names`, one under the other, in transformers' order: key head by key head, what belongs to each."""
    rows, start = [], 0
    for size in sizes:
        rows.append(start + np.arange(size).reshape(heads(config).keys, -1))
        start += size
    assert len(rows) == len(names)
    return np.concatenate(rows, axis=1).ravel()


def joints(config: ModelConfig) -> dict[str, tuple[str, np.ndarray]]:
    """transformers' joint projections: our matrices in them, and the order of their rows."""
    own = heads(config)
    keys, values = own.key_features, own.value_features
    return {
        "in_proj_qkvz": ("qkvz", order(config, "qkvz", [keys, keys, values, values])),
        "in_proj_ba": ("ba", order(config, "ba", [own.values, own.values])),
    }


def oracle(config: ModelConfig, params: subjects.Params) -> Any:
    """transformers' layer with our tensors."""
    own = heads(config)
    count = {"linear_num_key_heads": own.keys, "linear_num_value_heads": own.values}
    sizes = {"linear_key_head_dim": own.key_dim, "linear_value_head_dim": own.value_dim, "linear_conv_kernel_dim": config.conv_width}
    theirs = qwen.Qwen3NextConfig(hidden_size=config.dim, rms_norm_eps=config.norm_eps, num_hidden_layers=2, **count, **sizes)
    layer = qwen.Qwen3NextGatedDeltaNet(theirs, 0)
    weights = {
        f"{joint}.weight": np.concatenate([params[f"{name}_proj.weight"] for name in names])[rows]
        for joint, (names, rows) in joints(config).items()
    }
    weights |= {name: params[name] for name in ("A_log", "dt_bias", "norm.weight")}
    weights |= {"conv1d.weight": params["conv.weight"][:, None], "out_proj.weight": params["o_proj.weight"]}
    layer.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    return layer


def oracle_gradients(config: ModelConfig, layer: Any) -> subjects.Params:
    """Gradients of the layer's parameters, under our names."""
    found = {name: parameter.grad.numpy() for name, parameter in layer.named_parameters()}
    ours = {name: found[name] for name in ("A_log", "dt_bias", "norm.weight")}
    ours |= {"conv.weight": found["conv1d.weight"][:, 0], "o_proj.weight": found["out_proj.weight"]}
    for joint, (names, rows) in joints(config).items():
        stacked = np.empty_like(found[f"{joint}.weight"])
        stacked[rows] = found[f"{joint}.weight"]
        bounds = np.cumsum([len(tensors_of(config)[f"{name}_proj.weight"]) for name in names])[:-1]
        ours |= {f"{name}_proj.weight": part for name, part in zip(names, np.split(stacked, bounds), strict=True)}
    return ours


def inputs(config: ModelConfig, layer: str) -> tuple[np.ndarray, np.ndarray]:
    """x and the weights of the outputs in the sum that is differentiated."""
    rng = np.random.default_rng(3)
    x, weight = rng.standard_normal((2, BATCH, LAYERS[layer][0], config.dim)).astype(np.float32)
    return x, weight


def ours(backend: str, config: ModelConfig, params: subjects.Params, x: np.ndarray, weight: np.ndarray, chunk: int) -> Any:
    """Our layer's output, and the gradients of its sum weighted by `weight`, of the input too."""
    mixer_class = subjects.module(backend, "mixers.gated_deltanet").GatedDeltaNet
    context = subjects.module(backend, "modules").Context(None, None, None, chunk)

    def forward(values: Any) -> tuple[Any]:
        return (mixer_class(config, {f"{NAME}.{name}": value for name, value in values.items()}, NAME)(values["x"], context, {})[0],)

    (y,), grads = value_and_gradients(backend, forward, {**params, "x": x}, [weight])
    return y, grads


@pytest.mark.parametrize("layer", LAYERS)
def test_the_definition_equals_the_layer_of_qwen3_next(layer: str):
    config = model_of(layer)
    params, (x, _) = tensors_of(config), inputs(config, layer)
    with torch.no_grad():
        expected = oracle(config, params)(torch.tensor(x)).numpy()
    got = reference.forward(config, {name: value.astype(np.float64) for name, value in params.items()}, x.astype(np.float64), {})
    demand([Difference("output", largest(got, expected), FLOAT32.oracle)])


@pytest.mark.parametrize("layer", LAYERS)
def test_output_and_every_gradient_equal_the_layer_of_qwen3_next(backend: str, layer: str):
    config = model_of(layer)
    params, (x, weight) = tensors_of(config), inputs(config, layer)
    theirs, wanted = oracle(config, params), torch.tensor(x, requires_grad=True)
    expected = theirs(wanted)
    (expected * torch.tensor(weight)).sum().backward()
    got, grads = ours(backend, config, params, x, weight, LAYERS[layer][1])
    demand(
        [
            Difference("output", largest(got, expected.detach().numpy()), FLOAT32.oracle),
            *tensors(grads, oracle_gradients(config, theirs) | {"x": wanted.grad.numpy()}, GRADIENT, "gradient of "),
        ]
    )


@pytest.mark.parametrize("changed", ["q_proj.weight", "conv.weight", "A_log", "dt_bias", "b_proj.weight", "z_proj.weight"])
def test_a_layer_that_is_off_is_caught_by_the_oracle(changed: str):
    layer = "two value heads a key"
    config = model_of(layer)
    params, (x, _) = tensors_of(config), inputs(config, layer)
    with torch.no_grad():
        expected = oracle(config, params)(torch.tensor(x)).numpy()
    params[changed] = params[changed] * np.float32(1.001)
    got = reference.forward(config, {name: value.astype(np.float64) for name, value in params.items()}, x.astype(np.float64), {})
    with pytest.raises(Mismatch):
        demand([Difference("output", largest(got, expected), FLOAT32.oracle)])
