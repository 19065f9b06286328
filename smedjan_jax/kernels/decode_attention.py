"""Attention of one new token of each row to what its ring holds, in one kernel: entries that a row has not written are not read.

    o = sum_s p_s v_s,  p = softmax(q k_s / sqrt(K)),  over the entries s that stand less than `reach` positions behind

A program takes a key/value head of a row, with all query heads that read it, and walks through blocks of entries with the running maximum
and sums of flash attention (Dao, 2022). Its queries are filled up to the 16 rows of a tensor core's tile: products of single rows outside
of tensor cores were seven times slower than XLA. Where heads are few, the entries of each are dealt to several programs, whose results are
merged. The new key and value are written in the same kernel. What a row gives depends on nothing of the others.

Shapes: B rows, G key/value heads, R query heads that read one, K head size, L entries, S programs of a head, C entries of a block.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from smedjan_jax.kernels.special import exp
from smedjan_jax.kernels.tiles import FILLED, FLOAT32, Launch, call, dot, partial, power_of_two

LOWEST = -1e30  # of a score that is not seen: not -inf, whose differences are not numbers
MOST_SPLITS = 16

Ring = tuple[jax.Array, jax.Array]


class Plan(NamedTuple):
    """How a problem is run: entries of a block, programs of a head."""

    entries: int
    splits: int
    launch: Launch


def plan_for(heads: int, length: int) -> Plan:
    """As measured on an H200 (medium and xxl, 1 and 64 rows). heads: of keys, of all rows; length: of the ring."""
    splits = min(MOST_SPLITS, 2 * FILLED // heads, length // 128)
    return Plan(128, splits, Launch(4, 2)) if splits > 1 else Plan(64, 1, Launch(2, 3))


@functools.partial(jax.jit, static_argnames=("reach", "plan"))  # lowered once for all layers
def attend(
    query: jax.Array, new: Ring, ring: Ring, position: jax.Array, active: jax.Array, reach: int, plan: Plan | None = None
) -> tuple[jax.Array, Ring]:
    """[B, G, R, K] of queries [B, G, R, K] at the positions int32 [B], and the rings of keys and values [B, G, L, K] with the new ones
    [B, G, K] of the rows that are active, bool [B], in them.

    reach: positions that a token sees, itself included, at most L. L is at least the entries of a block.
    """
    (B, G, R, K), L = query.shape, ring[0].shape[2]
    C, S, launch = plan or plan_for(B * G, L)
    assert C <= L, "a block is longer than the ring"
    rows = power_of_two(R)
    filled = jnp.pad(query, ((0, 0), (0, 0), (0, rows - R), (0, 0)))
    of_row = pl.BlockSpec((1,), lambda b, g, s: (b,))
    of_group = pl.BlockSpec((None, None, rows, K), lambda b, g, s: (b, g, 0, 0))
    of_new = pl.BlockSpec((None, None, K), lambda b, g, s: (b, g, 0))
    of_ring = pl.BlockSpec((None, None, L, K), lambda b, g, s: (b, g, 0, 0))
    kernel = partial(_kernel, C=C, L=L, S=S, reach=reach)
    inputs = [position, active.astype(jnp.int32), filled, *(x.astype(y.dtype) for x, y in zip(new, ring, strict=True)), *ring]
    specs = [of_row, of_row, of_group, of_new, of_new, of_ring, of_ring]
    rings = [(x.shape, x.dtype, of_ring) for x in ring]
    if S == 1:
        outputs = [*rings, (filled.shape, query.dtype, of_group)]
        key, value, out = call(partial(kernel, lse=None), launch, (B, G, S), inputs, specs, outputs, {5: 0, 6: 1})
        return out[:, :, :R], (key, value)
    part = pl.BlockSpec((None, None, None, rows, K), lambda b, g, s: (b, g, s, 0, 0))
    number = pl.BlockSpec((None, None, None, rows), lambda b, g, s: (b, g, s, 0))
    outputs = [*rings, ((B, G, S, rows, K), FLOAT32, part), ((B, G, S, rows), FLOAT32, number)]
    key, value, out, lse = call(kernel, launch, (B, G, S), inputs, specs, outputs, {5: 0, 6: 1})
    out, share = out[:, :, :, :R], jax.nn.softmax(lse[:, :, :, :R], axis=2)
    return jnp.sum(out * share[..., None], axis=2).astype(query.dtype), (key, value)


def _kernel(position, active, query, new_key, new_value, key, value, key_out, value_out, out, lse, *, C, L, S, reach):
    """The share of one program, divided by its own sum; lse: logsumexp of its scores, where several are merged. The new entry is not read
    from the ring, into which the first program of a head writes it."""
    at, q = position[0], query[...]
    slot, filled = lax.rem(at, L), jnp.minimum(at + 1, L)
    # before the ring is full, entries that are out of reach lie in front
    begin = jnp.where(at < L, jnp.maximum(filled - reach, 0), 0) // C
    end = (filled + C - 1) // C
    each = (end - begin + S - 1) // S
    first = begin + pl.program_id(2) * each
    leads = pl.program_id(2) == 0

    @pl.when(leads & (active[0] != 0))
    def _():
        key_out[slot, :] = new_key[...]
        value_out[slot, :] = new_value[...]

    def body(block, carry):
        most, total, mixed = carry
        # the last block of a ring that blocks do not divide begins earlier, with entries that the one before it had
        start = block * C if L % C == 0 else jnp.minimum(block * C, L - C)
        entries, span = start + lax.broadcasted_iota(jnp.int32, (1, C), 1), pl.ds(start, C)
        behind = slot - entries
        behind = jnp.where(behind < 0, behind + L, behind)
        scores = dot(q, key[span, :], turn_b=True) * q.shape[-1] ** -0.5
        seen = (behind > 0) & (behind <= at) & (behind < reach)
        scores = jnp.where(seen if L % C == 0 else seen & (entries >= block * C), scores, LOWEST)
        larger = jnp.maximum(most, jnp.max(scores, axis=1))
        weights, kept = exp(scores - larger[:, None]), exp(most - larger)
        mixed = mixed * kept[:, None] + dot(weights.astype(q.dtype), value[span, :])
        return larger, total * kept + jnp.sum(weights, axis=1), mixed

    own = jnp.sum(q.astype(FLOAT32) * new_key[...].astype(FLOAT32)[None, :], axis=1) * q.shape[-1] ** -0.5
    mine = jnp.where(leads, jnp.broadcast_to(new_value[...].astype(FLOAT32)[None, :], q.shape), 0.0)
    start = jnp.where(leads, own, LOWEST), jnp.where(leads, jnp.ones_like(own), 0.0), mine
    most, total, mixed = lax.fori_loop(first, jnp.minimum(first + each, end), body, start)
    some = jnp.maximum(total, 1e-30)  # a program without entries has nothing
    out[...] = (mixed / some[:, None]).astype(out.dtype)
    if lse is not None:
        lse[...] = most + jnp.log(some)
