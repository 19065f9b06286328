"""RWKV's token shift as one kernel each way: every blend of a position with the one before it, of one reading of the features.

    y_m = x + (previous - x) mu_m        previous: x one position earlier, 0 before a sequence's or a document's first

Shapes: B batch, T positions, H parts of F features, M blends; R positions of a tile.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from smedjan_jax.kernels.tiles import FLOAT32, Launch, call, near, padded, partial, power_of_two


class Plan(NamedTuple):
    """How a problem is run: positions and features of a tile."""

    rows: int = 32
    features: int = 128
    forward: Launch = Launch(4, 1)
    backward: Launch = Launch(4, 1)


def token_shift(x: jax.Array, mu: jax.Array, documents: jax.Array | None, plan: Plan | None = None) -> tuple[jax.Array, ...]:
    """The M blends [B, T, D] of x [B, T, D] in its dtype; mu [M, D] float32; documents int32 [B, T]."""
    (_, T, D), plan = x.shape, plan or Plan()
    F = min(plan.features, power_of_two(D))
    wide, size = F * -(-D // F), plan.rows * -(-T // plan.rows)
    x = padded(padded(x, -1, wide), 1, size)
    docs = None if documents is None else jnp.pad(documents.astype(jnp.int32), ((0, 0), (0, size - T)), mode="edge")
    mixed = _shift(x, padded(mu.astype(FLOAT32), -1, wide), docs, plan._replace(features=F))
    return tuple(y[:, :T, :D] for y in mixed)


def _outputs(x, mu, docs, plan):
    (B, T, D), R, F = x.shape, plan.rows, plan.features
    tile = pl.BlockSpec((None, R, F), lambda b, h, i: (b, i, h))
    kernel = partial(_forward_kernel, R=R, masked=docs is not None)
    inputs, specs = _inputs([x], mu, docs, F)
    return tuple(call(kernel, plan.forward, (B, D // F, T // R), inputs, specs, [(x.shape, x.dtype, tile)] * len(mu)))


def _forward(x, mu, docs, plan):
    return _outputs(x, mu, docs, plan), (x, mu, docs)


def _backward(plan, saved, cotangents):
    x, mu, docs = saved
    (B, T, D), R, F, M = x.shape, plan.rows, plan.features, len(mu)
    outputs = [
        (x.shape, x.dtype, pl.BlockSpec((None, R, F), lambda b, h, i: (b, i, h))),
        ((B, T // R, M, D), FLOAT32, pl.BlockSpec((None, None, M, F), lambda b, h, i: (b, i, 0, h))),
    ]
    kernel = partial(_backward_kernel, R=R, masked=docs is not None)
    inputs, specs = _inputs([x, *cotangents], mu, docs, F)
    dx, sums = call(kernel, plan.backward, (B, D // F, T // R), inputs, specs, outputs)
    return dx, jnp.sum(sums, axis=(0, 1)), None


_shift: Any = jax.custom_vjp(_outputs, nondiff_argnums=(3,))
_shift.defvjp(_forward, _backward)


def _inputs(arrays, mu, docs, F):
    T = arrays[0].shape[1]
    numbers = jnp.zeros((1, 1), jnp.int32) if docs is None else docs
    of_row = pl.BlockSpec((1, 1), lambda b, h, i: (0, 0)) if docs is None else pl.BlockSpec((None, T), lambda b, h, i: (b, 0))
    small = pl.BlockSpec((len(mu), F), lambda b, h, i: (0, h))
    return [mu, numbers, *arrays], [small, of_row, *[pl.BlockSpec((None, T, F), lambda b, h, i: (b, 0, h))] * len(arrays)]


def _forward_kernel(mu, documents, x, *outputs, R, masked):
    at = pl.program_id(2) * R + lax.iota(jnp.int32, R)
    own = x[at, :].astype(FLOAT32)
    change = near(x, documents, at, -1, masked) - own
    for m, out in enumerate(outputs):
        out[...] = (own + change * mu[m, :][None, :]).astype(out.dtype)


def _backward_kernel(mu, documents, x, *refs, R, masked):
    *cotangents, dx, dmu = refs
    at = pl.program_id(2) * R + lax.iota(jnp.int32, R)
    change, total = near(x, documents, at, -1, masked) - x[at, :].astype(FLOAT32), jnp.zeros(dx.shape, FLOAT32)
    for m, cotangent in enumerate(cotangents):
        own, blend = cotangent[at, :].astype(FLOAT32), mu[m, :][None, :]
        dmu[m, :] = jnp.sum(own * change, axis=0)
        total = total + own * (1 - blend) + near(cotangent, documents, at, 1, masked) * blend
    dx[...] = total.astype(dx.dtype)
