"""Kernels and their plain twins: outputs, states and every gradient, on a CPU in the interpreter, on a GPU as they are.

SMEDJAN_TEST_DEVICE=gpu python -m pytest -m gpu tests/conformance/test_kernels.py
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

from smedjan_common.config import ModelConfig
from smedjan_common.errors import ConfigError
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.mixers.shared import Chunked
from tests.conformance import subjects
from tests.conformance.cases import CASES, train_config
from tests.conformance.compare import Difference, demand, demand_equal_bits, relative_l2, tensors
from tests.conformance.gates import FLOAT32

jax = pytest.importorskip("jax", reason="jax is not installed here")
jnp = jax.numpy

WITH_KERNELS = [name for name, row in MIXERS.items() if row.training is Chunked]
DECAYS = 0.2  # the size of log decays


class Core(NamedTuple):
    """A kernel and its twin, both (arrays, state, documents) -> (outputs, state), and arrays to try them on."""

    kernel: Callable[..., Any]
    twin: Callable[..., Any]
    arrays: Callable[..., Any]
    state: Callable[..., tuple[int, ...]]


def core(name: str, plan: dict[str, int] | None = None) -> Core:
    """The core of a mixer; plan: what of the kernel's own plan is another, None: nothing."""
    from smedjan_jax.kernels import channel_decay, delta_rule, scalar_decay
    from smedjan_jax.kernels.tiles import DeltaPlan
    from smedjan_jax.mixers import decay, gated_deltanet, rwkv

    module = {"linear": scalar_decay, "ssm": scalar_decay, "gated-deltanet": delta_rule, "rwkv": channel_decay}[name]
    form = {scalar_decay: scalar_decay.Plan, delta_rule: delta_rule.Plan}.get(module, DeltaPlan)
    chosen = None if plan is None else form(**plan)
    if module is scalar_decay:
        return Core(
            lambda arrays, state, documents: scalar_decay.scalar_decay(*arrays, state, documents, chosen),
            lambda arrays, state, documents: decay.scalar_decay(*arrays, 16, state, documents),
            scalar_arrays,
            lambda B, K, V, Q=1, R=1: (B, 2, R, K, V),
        )
    kernel, twin = (
        (delta_rule.gated_delta_rule, gated_deltanet.gated_delta_rule)
        if name == "gated-deltanet"
        else (channel_decay.dplr_delta_rule, rwkv.dplr_delta_rule)
    )
    return Core(
        lambda arrays, state, documents: kernel(arrays, state, documents, chosen),
        lambda arrays, state, documents: twin(arrays, state, documents, 16),
        delta_arrays if name == "gated-deltanet" else channel_arrays,
        lambda B, K, V: (B, 2, V, K),
    )


def scalar_arrays(rng: np.random.Generator, B: int, T: int, K: int, V: int, Q: int = 1, R: int = 1) -> tuple[np.ndarray, ...]:
    """query, key, value, log decay of two keys a position."""
    query, key = rng.standard_normal((B, T, 2, Q, K)), rng.standard_normal((B, T, 2, K))
    return query * K**-0.5, key, rng.standard_normal((B, T, 2, R, V)), -DECAYS * rng.random((B, T, 2, R))


def delta_arrays(rng: np.random.Generator, B: int, T: int, K: int, V: int) -> tuple[np.ndarray, ...]:
    """q, k, v, log decay, beta of two heads."""
    q, k = (unit(rng.standard_normal((B, T, 2, K))) for _ in range(2))
    return q, k, rng.standard_normal((B, T, 2, V)), -DECAYS * rng.random((B, T, 2)), rng.uniform(0.05, 0.95, (B, T, 2))


def channel_arrays(rng: np.random.Generator, B: int, T: int, K: int, V: int) -> tuple[np.ndarray, ...]:
    """r, log w, k, v, a, b of two heads, K = V."""
    r, k, v = (rng.standard_normal((B, T, 2, K)) for _ in range(3))
    probe = unit(rng.standard_normal((B, T, 2, K)))
    return r, -0.6 * rng.random((B, T, 2, K)), k, v, -probe, probe * rng.random((B, T, 2, K))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def outputs_and_gradients(function: Callable[..., Any], arrays: Any, state: Any, documents: Any) -> dict[str, np.ndarray]:
    """Outputs and last state, and the gradients of all arguments by one sum of both with fixed weights."""

    def run(arrays: Any, state: Any, weights: Any) -> Any:
        (out, last), pull = jax.vjp(lambda arrays, state: function(arrays, state, documents), arrays, state)
        return out, last, *pull((weights[0].astype(out.dtype), weights[1]))

    shapes = jax.eval_shape(lambda arrays, state: function(arrays, state, documents), arrays, state)
    weights = tuple(jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape) for x in shapes)
    out, last, dArrays, dState = jax.jit(run)(arrays, state, weights)
    found = {"outputs": out, "last state": last, "gradient of the state": dState}
    found |= {f"gradient of argument {i}": gradient for i, gradient in enumerate(dArrays)}
    return {name: np.asarray(value, np.float32) for name, value in found.items()}


def compare(name: str, plan: dict[str, int] | None, shape: dict[str, int], with_documents: bool, dtype: str, gate: float) -> None:
    """The kernel in `dtype` against the twin in float32, on the same arguments."""
    rng, it = np.random.default_rng(0), core(name, plan)
    host, B, T = it.arrays(rng, **shape), shape["B"], shape["T"]
    state = jnp.asarray(rng.standard_normal(it.state(**{key: value for key, value in shape.items() if key != "T"})), jnp.float32)
    arrays = tuple(jnp.asarray(x, jnp.float32 if i in wide(name) else dtype) for i, x in enumerate(host))
    documents = jnp.asarray(np.cumsum(rng.random((B, T)) < 0.1, axis=1) + 3, jnp.int32) if with_documents else None
    got = outputs_and_gradients(it.kernel, arrays, state, documents)
    with jax.default_matmul_precision("highest"):
        want = outputs_and_gradients(it.twin, tuple(x.astype(jnp.float32) for x in arrays), state, documents)
    assert all(np.abs(value).max() > 0 for value in want.values())
    demand([Difference(what, relative_l2(got[what], value), gate) for what, value in want.items()])


def wide(name: str) -> tuple[int, ...]:
    """Arguments that are float32 whatever the compute dtype: decays and rates."""
    return {"linear": (3,), "ssm": (3,), "gated-deltanet": (3, 4), "rwkv": (1,)}[name]


SMALL = {
    "linear-groups-documents-odd": ("linear", {"chunk": 16, "segments": 1}, {"B": 1, "T": 37, "K": 8, "V": 9, "Q": 2}, True),
    "linear-segments": ("linear", {"chunk": 16, "segments": 2}, {"B": 1, "T": 50, "K": 8, "V": 8}, True),
    "ssm-segments-documents-odd": ("ssm", {"chunk": 16, "segments": 2}, {"B": 1, "T": 37, "K": 8, "V": 9, "R": 3}, True),
    "gated-deltanet-halves-parts-odd": ("gated-deltanet", {"chunk": 32, "parts": 2}, {"B": 1, "T": 37, "K": 8, "V": 32}, True),
    "gated-deltanet-segments": (
        "gated-deltanet",
        {"chunk": 16, "parts": 1, "segments": 2, "chunks": 2},
        {"B": 1, "T": 50, "K": 8, "V": 16},
        True,
    ),
    "rwkv-parts-odd": ("rwkv", {"chunk": 16, "parts": 2}, {"B": 1, "T": 37, "K": 32, "V": 32}, True),
}


@pytest.mark.parametrize("key", [pytest.param(key, marks=pytest.mark.xdist_group(key)) for key in SMALL])
def test_a_kernel_is_its_twin_with_every_gradient(key: str):
    name, plan, shape, documents = SMALL[key]
    compare(name, plan, shape, documents, "float32", FLOAT32.one_op)


@pytest.mark.parametrize("shape", [{"K": 8, "V": 8, "R": 3}, {"K": 8, "V": 8}], ids=["shared-key", "own-key"])
def test_steps_and_skips_inside_of_the_kernel_are_those_outside(shape: dict[str, int]):
    """In two segments, with documents; the last two arguments are the steps and the skips."""
    from smedjan_jax.kernels.scalar_decay import scalar_decay
    from smedjan_jax.kernels.shared_keys import Plan, Scale
    from smedjan_jax.mixers import decay

    rng = np.random.default_rng(0)
    R = shape.get("R", 1)
    host = *scalar_arrays(rng, 1, 33, **shape), rng.uniform(0.5, 2, (1, 33, 2, R)), rng.standard_normal((2, R))
    arrays = tuple(jnp.asarray(x, jnp.float32) for x in host)
    state = jnp.asarray(rng.standard_normal((1, 2, R, shape["K"], shape["V"])), jnp.float32)
    documents = jnp.asarray(np.cumsum(rng.random((1, 33)) < 0.1, axis=1), jnp.int32)

    def kernel(arrays: Any, state: Any, documents: Any) -> Any:
        return scalar_decay(*arrays[:4], state, documents, Plan(16, 2), Scale(*arrays[4:]))

    def twin(arrays: Any, state: Any, documents: Any) -> Any:
        query, key, value, log_decay, step, skip = arrays
        out, last = decay.scalar_decay(query, key, value * step[..., None], log_decay, 16, state, documents)
        return out + skip[:, None, :, None] * value[:, :, :, None], last

    got, want = (outputs_and_gradients(function, arrays, state, documents) for function in (kernel, twin))
    demand([Difference(what, relative_l2(got[what], value), FLOAT32.one_op) for what, value in want.items()])


class Around(NamedTuple):
    """A kernel of what surrounds a core and its twin, both of the same arrays, documents; and those arrays."""

    kernel: Callable[..., Any]
    twin: Callable[..., Any]
    arrays: Callable[..., tuple[np.ndarray, ...]]  # of a generator, B, T, K


def around(name: str, rows: int = 0) -> Around:
    """rows: of a kernel's tile; 0: its own plan."""
    from smedjan_jax.kernels import conv, shift
    from smedjan_jax.kernels import rows as by_row
    from smedjan_jax.mixers import rwkv
    from smedjan_jax.mixers.conv import causal_conv

    parts = conv.Part(2, 0.5), conv.Part(1, 1.0), conv.Part(2), conv.Part(1)

    def convolved(arrays: Any, documents: Any) -> Any:
        active = jax.nn.silu(causal_conv(*arrays, None, documents)[0])
        q, k, *rest = jnp.split(active.reshape(*active.shape[:2], 6, -1), [2, 3, 5], axis=2)
        q, k = (x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + conv.EPS) for x in (q, k))
        return 0.5 * q, k, *rest

    def shifted(arrays: Any, documents: Any) -> Any:
        x, mu = arrays
        return tuple(x + (rwkv.token_shift(x, None, documents) - x) * each for each in mu)

    def gated(arrays: Any, documents: Any) -> Any:
        o, gate, weight = arrays
        return (o * jax.lax.rsqrt(jnp.mean(o * o, axis=-1, keepdims=True) + 1e-5) * weight * jax.nn.silu(gate),)

    def drawn(*shapes: Callable[..., tuple[int, ...]]) -> Callable[..., tuple[np.ndarray, ...]]:
        return lambda rng, B, T, K: tuple(rng.standard_normal(shape(B, T, K)) for shape in shapes)

    return {
        "conv": Around(
            lambda arrays, documents: conv.conv_silu(*arrays, documents, parts, conv.Plan(rows, 64, 4) if rows else None),
            convolved,
            drawn(lambda B, T, K: (B, T, 6 * K), lambda B, T, K: (6 * K, 4), lambda B, T, K: (6 * K,)),
        ),
        "shift": Around(
            lambda arrays, documents: shift.token_shift(*arrays, documents, shift.Plan(rows, 16) if rows else None),
            shifted,
            drawn(lambda B, T, K: (B, T, K), lambda B, T, K: (6, K)),
        ),
        "gated-norm": Around(
            lambda arrays, documents: (by_row.gated_norm(*arrays, 1e-5, by_row.Plan(16 * rows, 2) if rows else None),),
            gated,
            drawn(*[lambda B, T, K: (B, T, 3, K)] * 2, lambda B, T, K: (K,)),
        ),
    }[name]


def compare_around(it: Around, shape: dict[str, int], with_documents: bool, dtype: str, gate: float) -> None:
    """The kernel on its first arrays in `dtype` against the twin in float32, outputs and every gradient."""
    rng = np.random.default_rng(0)
    arrays = tuple(jnp.asarray(x, dtype if x.ndim > 2 else "float32") for x in it.arrays(rng, *shape.values()))
    documents = jnp.asarray(np.cumsum(rng.random((shape["B"], shape["T"])) < 0.1, axis=1) + 3, jnp.int32) if with_documents else None

    def run(function: Callable[..., Any], arrays: Any) -> list[np.ndarray]:
        out, pull = jax.vjp(lambda arrays: function(arrays, documents), arrays)
        weights = tuple(jnp.sin(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape).astype(x.dtype) for x in out)
        return [*out, *pull(weights)[0]]

    got = jax.jit(lambda arrays: run(it.kernel, arrays))(arrays)
    want = jax.jit(lambda arrays: run(it.twin, arrays))(tuple(x.astype(jnp.float32) for x in arrays))
    pairs = [(np.asarray(a, np.float32), np.asarray(b)) for a, b in zip(got, want, strict=True)]
    assert all(np.abs(b).max() > 0 for _, b in pairs)
    demand([Difference(f"array {i}", relative_l2(a, b), gate) for i, (a, b) in enumerate(pairs)])


AROUND = ("conv", "shift", "gated-norm")


@pytest.mark.parametrize("name", AROUND)
def test_a_kernel_around_a_core_is_its_twin_with_every_gradient(name: str):
    """Documents, a length that no tile divides, and features that fill no tile."""
    compare_around(around(name, rows=16), {"B": 2, "T": 37, "K": 24}, True, "float32", FLOAT32.one_op)


def by_blocks(form: str, B: int, T: int, heads: tuple[int, int], K: int, S: int, dtype: str) -> list[np.ndarray]:
    """Output and gradients of a form of block-sparse with three blocks for each query."""
    from smedjan_jax.mixers.block_sparse import FORMS

    rng = np.random.default_rng(0)
    query, cotangent = (jnp.asarray(rng.standard_normal((B, T, heads[0], K)), dtype) for _ in range(2))
    key, value = (jnp.asarray(rng.standard_normal((B, T, heads[1], K)), dtype) for _ in range(2))

    def run(*arrays: Any) -> Any:
        out, pull = jax.vjp(lambda *arrays: FORMS[form](*arrays, S, 3), *arrays)
        return out, *pull(cotangent.astype(out.dtype))

    return [np.asarray(x, np.float32) for x in jax.jit(run)(query, key, value)]


def test_the_kernel_over_key_blocks_is_attention_under_the_mask_with_every_gradient():
    """Two heads for each key, a last block that is short, and early queries that find fewer blocks than they may see."""
    got, want = (by_blocks(form, 2, 70, (4, 2), 16, 16, "float32") for form in ("pallas", "plain"))
    demand([Difference(f"array {i}", relative_l2(a, b), FLOAT32.one_op) for i, (a, b) in enumerate(zip(got, want, strict=True))])


def test_how_block_sparse_attends_is_chosen_by_length_and_said(monkeypatch: pytest.MonkeyPatch):
    kernels = subjects.module("jax", "kernels")
    model = ModelConfig.build(vocab_size=64, dim=64, layers=1, heads=2, mixer=("block-sparse",), block_size=16)
    assert kernels.for_blocks("auto", model, "bfloat16", 64) in ("gathered", "masked")  # a CPU, or a GPU
    monkeypatch.setattr(kernels, "_no_device", lambda: "")
    monkeypatch.setattr(kernels, "MEASURED", ("bfloat16", getattr(jax.devices()[0], "compute_capability", "")))
    short, long = kernels.LONGEST_MASKED, kernels.LONGEST_MASKED + 1
    assert kernels.blocks_summary("auto", model, "bfloat16", short) == "cuDNN with a mask for block-sparse"
    assert kernels.blocks_summary("auto", model, "bfloat16", long) == "pallas for block-sparse"
    assert kernels.for_blocks("reproducible", model, "bfloat16", short) == "pallas", "cuDNN's gradients differ from run to run"
    assert kernels.for_blocks("plain", model, "bfloat16", long) == "plain"
    odd = dataclasses.replace(model, block_size=24)
    assert kernels.for_blocks("auto", odd, "bfloat16", long) == "gathered", "tiles are powers of two"
    assert kernels.blocks_summary("auto", dataclasses.replace(model, mixer=("attention",)), "bfloat16", long) == ""


@pytest.mark.parametrize("vocabulary", [64, 300])
def test_the_loss_by_a_kernel_is_the_loss_with_every_gradient(vocabulary: int):
    from smedjan_jax.loss import cross_entropy, cross_entropy_by_kernel

    rng = np.random.default_rng(0)
    hidden, embed = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, 11, 16), (vocabulary, 16)))
    targets = jnp.asarray(rng.integers(-1, vocabulary, (2, 11)), jnp.int32)
    for z_loss in (0.0, 1e-3):
        found = [
            jax.tree.leaves(jax.jit(jax.value_and_grad(lambda *x, f=f: f(*x, targets, z_loss), (0, 1), has_aux=True))(hidden, embed))  # noqa: B023
            for f in (cross_entropy_by_kernel, cross_entropy)
        ]
        pairs = enumerate(zip(*found, strict=True))
        demand([Difference(f"leaf {i}", relative_l2(np.asarray(a), np.asarray(b)), FLOAT32.one_op) for i, (a, b) in pairs])


@pytest.mark.parametrize("name", WITH_KERNELS)
def test_products_in_kernels_stay_on_tensor_cores_whatever_the_precision_of_float32_is(name: str, monkeypatch: pytest.MonkeyPatch):
    """A product that says nothing takes jax_default_matmul_precision, which runs ask to be exact: on a GPU that is tens of times slower."""
    it, rng = core(name), np.random.default_rng(0)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    shape = {"B": 1, "T": 64, "K": 16, "V": 16}
    arrays = tuple(jnp.asarray(x, "float32" if i in wide(name) else "bfloat16") for i, x in enumerate(it.arrays(rng, **shape)))
    state = jnp.zeros(it.state(B=1, K=16, V=16))
    with jax.default_matmul_precision("highest"):
        jaxpr = jax.make_jaxpr(jax.grad(lambda arrays: it.kernel(arrays, state, None)[0].astype(jnp.float32).sum()))(arrays)
    products = [eqn for eqn in inside_kernels(jaxpr.jaxpr) if eqn.primitive.name == "dot_general"]
    assert products
    slow = [eqn for eqn in products if eqn.params["precision"] in (None, (jax.lax.Precision.HIGHEST,) * 2)]
    assert not slow, slow[:2]


def inside_kernels(jaxpr: Any, inside: bool = False) -> Iterator[Any]:
    """The equations of the kernels that a jaxpr calls."""
    for eqn in jaxpr.eqns:
        if inside:
            yield eqn
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from inside_kernels(inner, inside or eqn.primitive.name == "pallas_call")


@pytest.mark.parametrize(("mixer", "variant"), [*((mixer, "") for mixer in WITH_KERNELS), ("gated-deltanet", "-own-heads")])
def test_a_model_with_kernels_has_the_loss_and_gradients_of_the_plain_one(mixer: str, variant: str, monkeypatch: pytest.MonkeyPatch):
    """Through the backend as a run takes them; here nothing stands in the way of the interpreter."""
    case = CASES[f"{mixer}-swiglu-mha{variant}"]
    model = dataclasses.replace(case.model, layers=1)
    params = {name: value for name, value in case.params.items() if name in subjects.tensor_names(model)}
    plain = subjects.loss_and_gradients("jax", model, train_config(kernels="plain"), params, case.batches[0], case.documents)
    monkeypatch.setattr(subjects.module("jax", "kernels"), "_obstacle", lambda *args: "")
    fast = subjects.loss_and_gradients("jax", model, train_config(kernels="pallas"), params, case.batches[0], case.documents)
    tolerance = MIXERS[mixer].tolerance.gradient
    demand([Difference("loss", abs(fast[0] / plain[0] - 1), FLOAT32.same_arithmetic), *tensors(fast[1], plain[1], tolerance)])


@pytest.mark.parametrize("mixer", WITH_KERNELS)
def test_a_prompt_through_the_kernels_leaves_the_state_of_the_plain_forms(mixer: str, monkeypatch: pytest.MonkeyPatch):
    from smedjan_jax.model import Model

    case = CASES[f"{mixer}-swiglu-mha"]
    model = dataclasses.replace(case.model, layers=1)
    params = {name: jnp.asarray(value) for name, value in case.params.items() if name in subjects.tensor_names(model)}
    kernels, module = subjects.module("jax", "kernels"), subjects.module("jax", f"mixers.{MIXERS[mixer].module}")
    monkeypatch.setattr(kernels, "_obstacle", lambda *args: "")
    monkeypatch.setattr(module, "SHORTEST", 2)
    tokens, found = jnp.asarray(case.tokens), {}
    for name in ("plain", "pallas"):
        built = Model(model, params, kernels=name)
        state = built.init_state(len(tokens), tokens.shape[1])
        logits, state = jax.jit(lambda t, s, built=built: built.step(t, s))(tokens, state)
        found[name] = {"logits": np.asarray(logits)} | {each: np.asarray(value) for each, value in state["layers"][0].items()}
    demand(tensors(found["pallas"], found["plain"], MIXERS[mixer].tolerance.forward))


def test_kernels_by_name_are_refused_where_they_cannot_run(backend: str):
    model = ModelConfig.build(vocab_size=64, dim=32, layers=2, heads=4, mixer=("linear", "attention"))
    if backend == "mlx" or jax.default_backend() != "gpu":
        with pytest.raises(ConfigError, match="--kernels pallas cannot run"):
            subjects.make_backend(backend, model, train_config(kernels="pallas"))
    assert subjects.make_backend(backend, model, train_config(kernels="auto")).describe().kernels in ("plain", "pallas")
    attention = dataclasses.replace(model, mixer=("attention",))
    assert subjects.make_backend(backend, attention, train_config(kernels="auto")).describe().kernels == ""


@pytest.mark.parametrize("name", WITH_KERNELS)
def test_kernels_are_lowered_for_a_gpu_by_the_installed_jax(name: str, monkeypatch: pytest.MonkeyPatch):
    """No GPU is needed to see that this JAX still takes everything that the kernels are made of, for the usual sizes and the largest."""
    from jax import export

    it, rng = core(name), np.random.default_rng(0)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for size in (64, 128):
        shape = {"B": 1, "T": 70, "K": size, "V": 64 if name == "ssm" else size} | ({"R": 2} if name == "ssm" else {})
        arrays = tuple(jnp.asarray(x, "float32" if i in wide(name) else "bfloat16") for i, x in enumerate(it.arrays(rng, **shape)))
        state = jnp.zeros(it.state(**{key: value for key, value in shape.items() if key != "T"}))
        documents = jnp.zeros((1, 70), jnp.int32)

        def total(arrays: Any, state: Any, documents: Any) -> Any:
            return jax.grad(lambda arrays: it.kernel(arrays, state, documents)[0].astype(jnp.float32).sum())(arrays)

        allowed = [export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
        exported = export.export(jax.jit(total), platforms=["cuda"], disabled_checks=allowed)(arrays, state, documents)
        assert "triton" in exported.mlir_module()


LARGE = {"linear": {"Q": 2}, "ssm": {"R": 4}, "gated-deltanet": {}, "rwkv": {}}


def on_a_gpu() -> list:
    """Mixers, head sizes, dtypes with their gates; rwkv's tiles of 128 in float32 are too large for shared memory, and refused."""
    gates = {"bfloat16": 2e-2, "float32": 5e-6}
    cases = itertools.product(LARGE, (32, 64, 128), gates)
    return [(*case, gates[case[2]]) for case in cases if case != ("rwkv", 128, "float32")]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "size", "dtype", "gate"), on_a_gpu())
def test_on_a_gpu_a_kernel_is_its_twin(name: str, size: int, dtype: str, gate: float):
    shape = {"B": 2, "T": 1100, "K": size, "V": 64 if name == "ssm" else size}
    compare(name, None, shape | LARGE[name], True, dtype, gate)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", AROUND)
def test_on_a_gpu_a_kernel_around_a_core_is_its_twin(name: str, dtype: str):
    gate = {"bfloat16": 5e-3, "float32": 1e-6}[dtype]
    compare_around(around(name), {"B": 2, "T": 1100, "K": 64}, True, dtype, gate)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["pallas", "masked"])
def test_on_a_gpu_block_sparse_is_attention_under_the_mask(form: str):
    got, want = (by_blocks(each, 2, 1000, (4, 2), 64, 64, "bfloat16") for each in (form, "plain"))
    demand([Difference(f"array {i}", relative_l2(a, b), 2e-2) for i, (a, b) in enumerate(zip(got, want, strict=True))])
    if form == "pallas":
        assert all((a == b).all() for a, b in zip(got, by_blocks(form, 2, 1000, (4, 2), 64, 64, "bfloat16"), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGE)
def test_on_a_gpu_a_kernel_gives_the_same_bits_every_time(name: str):
    rng, it = np.random.default_rng(0), core(name)
    shape = {"B": 2, "T": 512, "K": 64, "V": 64} | LARGE[name]
    arrays = tuple(jnp.asarray(x, "float32" if i in wide(name) else "bfloat16") for i, x in enumerate(it.arrays(rng, **shape)))
    state = jnp.zeros(it.state(**{key: value for key, value in shape.items() if key != "T"}))
    demand_equal_bits(*(outputs_and_gradients(it.kernel, arrays, state, None) for _ in range(2)))
