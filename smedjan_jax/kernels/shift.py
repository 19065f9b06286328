"""RWKV's token shift as one kernel each way: every blend of a position with the one before it, of one reading of the features.

    y_m = x + (previous - x) mu_m        previous: x one position earlier, 0 before a sequence's or a document's first

A blend that a narrow matrix W is multiplied with need not be written at all: y_m W = x W + (previous - x) (mu_m W), so that x and
`previous - x`, side by side, serve all of those in one product (`paired`).

Shapes: B batch, T positions, H parts of F features, M blends; R positions of a tile. Backward a program takes several tiles, one after
the other, and adds up its part of d mu once.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from smedjan_jax.kernels.tiles import FLOAT32, Launch, call, near, padded, partial, place, power_of_two


class Plan(NamedTuple):
    """How a problem is run: positions and features of a tile, tiles of a program backward. What was fastest on an H200, with 64 x 1024 x
    512, three blends and a pair: 137 us backward, 99 forward."""

    rows: int = 8
    features: int = 128
    tiles: int = 16
    forward: Launch = Launch(4, 1)
    backward: Launch = Launch(8, 1)


def token_shift(x: jax.Array, mu: jax.Array, documents: jax.Array | None, plan: Plan | None = None) -> tuple[jax.Array, ...]:
    """The M blends [B, T, D] of x [B, T, D] in its dtype; mu [M, D] float32; documents int32 [B, T]."""
    return _shifted(x, mu, documents, plan, False)


def paired(x: jax.Array, mu: jax.Array, documents: jax.Array | None, plan: Plan | None = None) -> tuple[jax.Array, ...]:
    """x and previous - x side by side, [B, T, 2 D], then the same as `token_shift`."""
    return _shifted(x, mu, documents, plan, True)


def _shifted(x, mu, documents, plan, pair):
    (B, T, D), plan = x.shape, plan or Plan()
    F = min(plan.features, power_of_two(D))
    plan = plan._replace(features=F, tiles=min(plan.tiles, -(-T // plan.rows)))
    program = plan.rows * plan.tiles
    wide, size = F * -(-D // F), program * -(-T // program)
    x = padded(padded(x, -1, wide), 1, size)
    docs = None if documents is None else jnp.pad(documents.astype(jnp.int32), ((0, 0), (0, size - T)), mode="edge")
    mixed = _shift(x, padded(mu.astype(FLOAT32), -1, wide), docs, plan, pair)
    return tuple(y[:, :T, :D] if y.ndim == 3 else y[:, :T, :, :D].reshape(B, T, 2 * D) for y in mixed)


def _outputs(x, mu, docs, plan, pair):
    (B, T, D), R, F = x.shape, plan.rows, plan.features
    tile = pl.BlockSpec((None, R, F), lambda b, h, i: (b, i, h))
    kernel = partial(_forward_kernel, R=R, masked=docs is not None, pair=pair)
    inputs, specs = _inputs([x], mu, docs, F)
    outputs = [((B, T, 2, D), x.dtype, pl.BlockSpec((None, R, 2, F), lambda b, h, i: (b, i, 0, h)))] * pair
    outputs += [(x.shape, x.dtype, tile)] * len(mu)
    return tuple(call(kernel, plan.forward, (B, D // F, T // R), inputs, specs, outputs, together=True))


def _forward(x, mu, docs, plan, pair):
    return _outputs(x, mu, docs, plan, pair), (x, mu, docs)


def _backward(plan, pair, saved, cotangents):
    x, mu, docs = saved
    (B, T, D), R, F, M = x.shape, plan.rows, plan.features, len(mu)
    n = T // (R * plan.tiles)
    outputs = [
        (x.shape, x.dtype, pl.BlockSpec((None, R * plan.tiles, F), lambda b, h, i: (b, i, h))),
        ((B, n, M, D), FLOAT32, pl.BlockSpec((None, None, M, F), lambda b, h, i: (b, i, 0, h))),
    ]
    kernel = partial(_backward_kernel, R=R, steps=plan.tiles, masked=docs is not None, pair=pair)
    inputs, specs = _inputs([x, *cotangents[pair:]], mu, docs, F)
    if pair:
        inputs.append(cotangents[0])
        specs.append(pl.BlockSpec((None, T, 2, F), lambda b, h, i: (b, 0, 0, h)))
    dx, sums = call(kernel, plan.backward, (B, D // F, n), inputs, specs, outputs, together=True)
    return dx, jnp.sum(sums, axis=(0, 1)), None


_shift: Any = jax.custom_vjp(_outputs, nondiff_argnums=(3, 4))
_shift.defvjp(_forward, _backward)


def _inputs(arrays, mu, docs, F):
    T = arrays[0].shape[1]
    numbers = jnp.zeros((1, 1), jnp.int32) if docs is None else docs
    of_row = pl.BlockSpec((1, 1), lambda b, h, i: (0, 0)) if docs is None else pl.BlockSpec((None, T), lambda b, h, i: (b, 0))
    small = pl.BlockSpec((len(mu), F), lambda b, h, i: (0, h))
    return [mu, numbers, *arrays], [small, of_row, *[pl.BlockSpec((None, T, F), lambda b, h, i: (b, 0, h))] * len(arrays)]


def _forward_kernel(mu, documents, x, *outputs, R, masked, pair):
    at = place() * R + lax.iota(jnp.int32, R)
    own = x[at, :].astype(FLOAT32)
    change = near(x, documents, at, -1, masked) - own
    if pair:
        both, *outputs = outputs
        both[:, 0, :], both[:, 1, :] = own.astype(both.dtype), change.astype(both.dtype)
    for m, out in enumerate(outputs):
        out[...] = (own + change * mu[m, :][None, :]).astype(out.dtype)


def _backward_kernel(mu, documents, x, *refs, R, steps, masked, pair):
    *cotangents, dx, dmu = refs
    if pair:
        *cotangents, both = cotangents
    start, blends = place() * R * steps, [mu[m, :][None, :] for m in range(len(cotangents))]

    def body(i, sums):
        at = start + i * R + lax.iota(jnp.int32, R)
        change, total = near(x, documents, at, -1, masked) - x[at, :].astype(FLOAT32), jnp.zeros((R, x.shape[-1]), FLOAT32)
        if pair:
            total = both[at, 0, :].astype(FLOAT32) - both[at, 1, :].astype(FLOAT32) + near(both, documents, at, 1, masked, 1)
        found = []
        for cotangent, blend, added in zip(cotangents, blends, sums, strict=True):
            own = cotangent[at, :].astype(FLOAT32)
            found.append(added + own * change)
            total = total + own + (near(cotangent, documents, at, 1, masked) - own) * blend
        dx[pl.ds(i * R, R), :] = total.astype(dx.dtype)
        return found

    sums = lax.fori_loop(0, steps, body, [jnp.zeros((R, x.shape[-1]), FLOAT32) for _ in cotangents])
    for m, each in enumerate(sums):
        dmu[m, :] = jnp.sum(each, axis=0)
