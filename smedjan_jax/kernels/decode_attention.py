"""Attention of one new token of each row to what its ring holds, in one kernel: entries that a row has not written are not read.

    o = sum_s p_s v_s,  p = softmax(q k_s / sqrt(K)),  over the entries s that stand less than `reach` positions behind

A program takes a key/value head of a row, with all query heads that read it, in blocks of entries; where there are few of those, its
entries are dealt to several programs, whose sums are merged. What a row gives depends on nothing of the others.

Shapes: B rows, H query and G key/value heads, R = H / G, K head size, L entries, S programs of a head, C entries of a block.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from smedjan_jax.kernels.tiles import FILLED, FLOAT32, Launch, call, power_of_two

BLOCK = 64  # entries; of heads that share keys fewer, so that a program's registers hold their products
SMALLEST_BLOCK = 16
MOST_SPLITS = 16
LAUNCH = Launch(4, 2)


def attend(query: jax.Array, key: jax.Array, value: jax.Array, position: jax.Array, reach: int, splits: int = 0) -> jax.Array:
    """[B, H, K] of queries [B, H, K] at the positions [B] and rings of keys and values [B, G, L, K], which hold theirs. splits 0: as many
    as fill the GPU."""
    (B, H, K), (_, G, L, _) = query.shape, key.shape
    R, wide = H // G, power_of_two(H // G)
    S = splits or max(1, min(MOST_SPLITS, 2 * FILLED // (B * G)))
    grouped = jnp.pad(query.reshape(B, G, R, K), ((0, 0), (0, 0), (0, wide - R), (0, 0)))
    of_row = pl.BlockSpec((1,), lambda b, g, s: (b,))
    of_group = pl.BlockSpec((None, None, wide, K), lambda b, g, s: (b, g, 0, 0))
    ring = pl.BlockSpec((None, None, L, K), lambda b, g, s: (b, g, 0, 0))
    part = pl.BlockSpec((None, None, None, wide, K), lambda b, g, s: (b, g, s, 0, 0))
    number = pl.BlockSpec((None, None, None, wide), lambda b, g, s: (b, g, s, 0))
    kernel = functools.partial(_part, L, reach, S, max(SMALLEST_BLOCK, BLOCK // wide))
    outputs = [((B, G, S, wide, K), FLOAT32, part), ((B, G, S, wide), FLOAT32, number), ((B, G, S, wide), FLOAT32, number)]
    out, largest, total = call(kernel, LAUNCH, (B, G, S), (position, grouped, key, value), (of_row, of_group, ring, ring), outputs)
    share = jnp.exp(largest - jnp.max(largest, axis=2, keepdims=True))
    merged = jnp.sum(out * share[..., None], axis=2) / jnp.sum(total * share, axis=2)[..., None]
    return merged[:, :, :R].reshape(B, H, K).astype(query.dtype)


def _part(L: int, reach: int, S: int, C: int, position, query, key, value, out, largest, total) -> None:
    """The sums of one program, not yet divided, with the largest score and the sum of the weights of each query."""
    at, scale = position[0], query.shape[-1] ** -0.5
    q_R1K = query[...].astype(FLOAT32)[:, None] * scale
    blocks = (jnp.minimum(at + 1, L) + C - 1) // C
    each = (blocks + S - 1) // S
    first = pl.program_id(2) * each

    def body(block: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        most, weight, mixed = carry
        begin = block * C
        start = jnp.minimum(begin, L - C)  # the last block may reach back into the one before
        entries = start + lax.broadcasted_iota(jnp.int32, (1, C), 1)
        behind = lax.rem(at - entries + L * (at // L + 1), L)
        seen_1C = (behind <= at) & (behind < reach) & (entries >= begin)
        span = pl.ds(start, C)
        scores_RC = jnp.sum(q_R1K * key[span, :].astype(FLOAT32)[None], axis=2)
        scores_RC = jnp.where(seen_1C, scores_RC, -jnp.inf)
        larger = jnp.maximum(most, jnp.max(scores_RC, axis=1))
        safe = jnp.where(larger > -jnp.inf, larger, 0.0)
        kept, p_RC = jnp.exp(most - safe), jnp.exp(scores_RC - safe[:, None])
        added = jnp.sum(p_RC[:, :, None] * value[span, :].astype(FLOAT32)[None], axis=1)
        return larger, weight * kept + jnp.sum(p_RC, axis=1), mixed * kept[:, None] + added

    rows, K = query.shape
    start = jnp.full((rows,), -jnp.inf, FLOAT32), jnp.zeros((rows,), FLOAT32), jnp.zeros((rows, K), FLOAT32)
    most, weight, mixed = lax.fori_loop(first, jnp.minimum(first + each, blocks), body, start)
    out[...], largest[...], total[...] = mixed, most, weight
