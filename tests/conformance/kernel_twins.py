"""Kernels beside their plain twins, for the tests on a CPU (test_kernels.py) and on a GPU (test_kernels_gpu.py)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.conformance.compare import Difference, demand, relative_l2

jax = pytest.importorskip("jax", reason="jax is not installed here")
jnp = jax.numpy

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
