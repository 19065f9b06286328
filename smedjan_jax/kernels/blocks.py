"""Attention of queries to the blocks that they chose, a program for each block of keys (mixers/block_sparse.py).

A block's keys and values stay in registers while its queries come by: those of the block itself, which see it up to themselves, then
those of later blocks that chose it, gathered tile by tile from a list sorted by block. What a query gets from one block is written to a
slot of its own; the slots are merged by their log-sum-exp. Backward, with L the merged log-sum-exp and D = <do, o>,

    P = e^{S - L};  dV += P^T do;  dS = P (do V^T - D);  dK += dS^T q;  dq += dS K                      S = q K^T / sqrt(K)

again with dK and dV in registers and dq in slots. So nothing is added up by atomic operations: the bits are the same every time.

Shapes: N = B G sequences of T positions, J blocks of S positions each, Y = N J; R query heads, K features; E chosen blocks, E + 1 slots.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from smedjan_jax.kernels.special import exp
from smedjan_jax.kernels.tiles import FLOAT32, Launch, call, dot, partial

FORWARD, BACKWARD = Launch(4, 1), Launch(4, 1)


class Lists(NamedTuple):
    """Which slots belong to each block."""

    slots: jax.Array  # int32 [N T E + S] slots of chosen blocks, sorted by block; those of no block and the filling are N T (E + 1)
    start: jax.Array  # int32 [Y] where a block's begin
    count: jax.Array  # int32 [Y]
    used: jax.Array  # bool [N, T, E + 1]


def lists(chosen: jax.Array, J: int, S: int) -> Lists:
    """Of the choices int32 [N, T, E], J for none."""
    N, T, E = chosen.shape
    none = N * T * (E + 1)
    block = jnp.where(chosen < J, chosen + J * jnp.arange(N)[:, None, None], N * J).reshape(-1)
    slot = (jnp.arange(N * T, dtype=jnp.int32)[:, None] * (E + 1) + jnp.arange(E, dtype=jnp.int32)).reshape(-1)
    block, slots = lax.sort((block, slot), num_keys=1)
    edges = jnp.searchsorted(block, jnp.arange(N * J + 1)).astype(jnp.int32)
    used = jnp.concatenate([chosen < J, jnp.ones((N, T, 1), bool)], axis=2)
    return Lists(jnp.pad(jnp.where(block < N * J, slots, none), (0, S), constant_values=none), edges[:-1], edges[1:] - edges[:-1], used)


def attend(query: jax.Array, key: jax.Array, value: jax.Array, found: Lists) -> jax.Array:
    """[N, T, R, K] of queries [N, T, R, K], keys and values [Y, S, K]."""
    return _attend(query, key, value, found)


def _outputs(query, key, value, found):
    return _forward(query, key, value, found)[0]


def _forward(query, key, value, found):
    (N, T, R, K), (Y, S, _), E1 = query.shape, key.shape, found.used.shape[2]
    slots = N * T * E1 + 1  # the last is where what fills a tile goes
    outputs = [((slots, R, K), query.dtype, _rows(slots, K)), ((slots, R), FLOAT32, _numbers(slots))]
    kernel = partial(_forward_kernel, S=S, E=E1 - 1, T=T, scale=K**-0.5)
    specs = [_rows(N * T, K), _block(S, K), _block(S, K), *_list_specs(found)]
    inputs = [query.reshape(N * T, R, K), key, value, *found[:3]]
    out, lse = call(kernel, FORWARD, (Y, R), inputs, specs, outputs)
    used = found.used[..., None]
    lse = jnp.where(used, lse[:-1].reshape(N, T, E1, R), -jnp.inf)
    total = jax.nn.logsumexp(lse, axis=2)
    weights = jnp.exp(lse - total[:, :, None])[..., None]
    parts = jnp.where(used[..., None], out[:-1].reshape(N, T, E1, R, K).astype(FLOAT32) * weights, 0.0)
    merged = parts.sum(axis=2).astype(query.dtype)
    return merged, (query, key, value, found, merged, total)


def _backward(saved, do):
    query, key, value, found, out, total = saved
    (N, T, R, K), (Y, S, _), E1 = query.shape, key.shape, found.used.shape[2]
    slots, do = N * T * E1 + 1, do.astype(query.dtype)
    owed = jnp.sum(out.astype(FLOAT32) * do.astype(FLOAT32), axis=-1).reshape(N * T, R)
    of_block = ((Y, R, S, K), FLOAT32, pl.BlockSpec((None, None, S, K), lambda y, r: (y, r, 0, 0)))
    kernel = partial(_backward_kernel, S=S, E=E1 - 1, T=T, scale=K**-0.5)
    specs = [_rows(N * T, K), _block(S, K), _block(S, K), *_list_specs(found), _rows(N * T, K), _numbers(N * T), _numbers(N * T)]
    inputs = [query.reshape(N * T, R, K), key, value, *found[:3], do.reshape(N * T, R, K), total.reshape(N * T, R), owed]
    dq, dk, dv = call(kernel, BACKWARD, (Y, R), inputs, specs, [((slots, R, K), query.dtype, _rows(slots, K)), of_block, of_block])
    dq = jnp.where(found.used[..., None, None], dq[:-1].reshape(N, T, E1, R, K).astype(FLOAT32), 0.0).sum(axis=2)
    return dq.astype(query.dtype), dk.sum(axis=1).astype(key.dtype), dv.sum(axis=1).astype(value.dtype), None


_attend: Any = jax.custom_vjp(_outputs)
_attend.defvjp(_forward, _backward)


def _rows(rows: int, features: int) -> pl.BlockSpec:
    """[rows, R, features]: all rows of a head."""
    return pl.BlockSpec((rows, None, features), lambda y, r: (0, r, 0))


def _numbers(rows: int) -> pl.BlockSpec:
    return pl.BlockSpec((rows, None), lambda y, r: (0, r))


def _block(S: int, K: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, S, K), lambda y, r: (y, 0, 0))


def _list_specs(found: Lists) -> list[pl.BlockSpec]:
    return [pl.BlockSpec(found.slots.shape, lambda y, r: (0,)), *[pl.BlockSpec((1,), lambda y, r: (y,))] * 2]


def _own(S: int, E: int, T: int) -> tuple[jax.Array, jax.Array]:
    """The rows of the queries of the program's own block, and which of its keys each sees."""
    y = pl.program_id(0)
    column = [lax.broadcasted_iota(jnp.int32, (S, S), axis) for axis in (0, 1)]
    return y * S + lax.iota(jnp.int32, S), column[0] >= column[1]


def _later(slots: Any, at: Any, m: Any, S: int, E: int, last: int) -> tuple[jax.Array, jax.Array]:
    """Slots of tile m of the queries that chose the block, and their rows; what fills the tile is the row `last`."""
    slot = slots[pl.ds(at + m * S, S)]
    return slot, jnp.minimum(slot // (E + 1), last)


def _forward_kernel(query, key, value, slots, start, count, out, lse, *, S, E, T, scale):
    k, v, last = key[...], value[...], query.shape[0] - 1

    def tile(slot, row, seen):
        scores = dot(query[row, :], k, turn_b=True) * scale
        scores = scores if seen is None else jnp.where(seen, scores, -jnp.inf)
        largest = jnp.max(scores, axis=1)
        powers = exp(scores - largest[:, None])
        total = jnp.sum(powers, axis=1)
        out[slot, :] = (dot(powers.astype(v.dtype), v) / total[:, None]).astype(out.dtype)
        lse[slot] = largest + jnp.log(total)

    row, seen = _own(S, E, T)
    tile(row * (E + 1) + E, row, seen)
    at, many = start[0], count[0]

    def body(m, nothing):
        slot, row = _later(slots, at, m, S, E, last)
        # the list goes on with the next block's: those are not of this tile
        slot = jnp.where(m * S + lax.iota(jnp.int32, S) < many, slot, out.shape[0] - 1)
        tile(slot, row, None)
        return nothing

    lax.fori_loop(0, (many + S - 1) // S, body, jnp.int32(0))


def _backward_kernel(query, key, value, slots, start, count, do, total, owed, dq, dk, dv, *, S, E, T, scale):
    k, v, last = key[...], value[...], query.shape[0] - 1

    def tile(slot, row, seen, sums):
        q, out = query[row, :], do[row, :]
        weights = exp(dot(q, k, turn_b=True) * scale - total[row][:, None])
        weights = jnp.where(seen, weights, 0.0)
        slopes = (weights * (dot(out, v, turn_b=True) - owed[row][:, None]) * scale).astype(q.dtype)
        dq[slot, :] = dot(slopes, k).astype(dq.dtype)
        return sums[0] + dot(slopes, q, turn_a=True), sums[1] + dot(weights.astype(q.dtype), out, turn_a=True)

    row, seen = _own(S, E, T)
    zeros = jnp.zeros(k.shape, FLOAT32)
    sums = tile(row * (E + 1) + E, row, seen, (zeros, zeros))
    at, many = start[0], count[0]

    def body(m, sums):
        slot, row = _later(slots, at, m, S, E, last)
        inside = m * S + lax.iota(jnp.int32, S) < many
        return tile(jnp.where(inside, slot, dq.shape[0] - 1), row, inside[:, None] & (seen | True), sums)

    dk[...], dv[...] = lax.fori_loop(0, (many + S - 1) // S, body, sums)
