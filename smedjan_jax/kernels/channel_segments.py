"""What a segment of a sequence makes of the state before it (segments.py), for the delta rule with a decay for each channel.

    S -> M S + A;  backward dS -> M^T dS + A'

By sweeps that leave nothing but the last state, of the tiles that the sweeps themselves take (channel_decay.py): of L they need A alone to
go forward, of N B alone for M and to go back, so that two of them read less than one sweep does. Tiles here are as high as a chunk.

Shapes: as in channel_decay.py; [B N, T / N, ...] for N segments.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from smedjan_jax.kernels.channel_tiles import kept
from smedjan_jax.kernels.segments import first_state
from smedjan_jax.kernels.tiles import (
    FLOAT32,
    SMALLEST,
    DeltaPlan,
    borders_at,
    call,
    documents_or_none,
    dot,
    of_chunks,
    of_head,
    only,
    partial,
    walk,
    whole_specs,
)


def walks(n: int, K: int, C: int) -> list[pl.BlockSpec]:
    """Of L, N, X and e^G at the chunks' ends, for programs that walk."""
    return [of_chunks(n, 2 * C, K)] * 2 + [of_chunks(n, C, C), of_head(n, K)]


def summaries(v: jax.Array, tiles: list[jax.Array], docs: Any, plan: DeltaPlan) -> list[jax.Array]:
    """A [B N, H, K, V] and M [B N, H, K, K], float32. tiles: L, N, X and e^G at the chunks' ends."""
    (B, T, H, V), K, C = v.shape, tiles[0].shape[-1], plan.chunk
    docs, masked = documents_or_none(docs)
    n, found = T // C, []
    for columns, identity in ((V, False), (K, True)):
        parts = min(plan.parts, columns // SMALLEST)
        specs = [walk(T, V) if identity else walk(T, V, parts), *walks(n, K, C), *whole_specs(masked, T, n)]
        kernel = partial(_summary_kernel, C=C, n=n, masked=masked, identity=identity)
        outputs = [((B, H, K, columns), FLOAT32, of_head(K, columns, parts))]
        found += call(kernel, plan.forward, (B, H, parts), [v, *tiles, *docs], specs, outputs, together=True)
    return found


def _summary_kernel(v, left, right, x, end, documents, edges, out, *, C, n, masked, identity):
    def body(i, carry):
        S, decay = carry
        following = end[jnp.minimum(i + 1, n - 1), :]  # a step ahead, as in the sweep
        b = borders_at(C, i, documents, edges, masked)
        probe, rank = left[i, pl.ds(C, C), :], right[i, pl.ds(C, C), :]
        dtype = rank.dtype
        z = dot(only(b.reads, probe), S.astype(dtype))
        S = kept(b.keeps, S)
        if not identity:
            key, value = right[i, pl.ds(0, C), :], v[pl.ds(i * C, C), :]
            z = z + dot(jnp.where(b.below, dot(probe, key, turn_b=True), 0.0).astype(dtype), value)
            S = S + dot(only(b.writes, key), value, turn_a=True)
        below = dot(x[i], z.astype(dtype)).astype(dtype)
        return decay[:, None] * (S + dot(only(b.writes, rank), below, turn_a=True)), following

    first = first_state(out, identity, pl.program_id(1))
    out[...], _ = lax.fori_loop(0, n, body, (first, end[0, :]))


def summaries_back(do: jax.Array, tiles: list[jax.Array], docs: Any, plan: DeltaPlan) -> jax.Array:
    """A' [B N, H, K, V] float32."""
    (B, T, H, V), K, C, parts = do.shape, tiles[0].shape[-1], plan.chunk, plan.parts
    docs, masked = documents_or_none(docs)
    n = T // C
    specs = [*walks(n, K, C), *whole_specs(masked, T, n), walk(T, V, parts)]
    kernel, outputs = partial(_summary_back_kernel, C=C, n=n, masked=masked), [((B, H, K, V), FLOAT32, of_head(K, V, parts))]
    return call(kernel, plan.backward, (B, H, parts), [*tiles, *docs, do], specs, outputs, together=True)[0]


def _summary_back_kernel(left, right, x, end, documents, edges, do, out, *, C, n, masked):
    def body(m, carry):
        dS, decay = carry
        i = n - 1 - m
        following = end[jnp.maximum(i - 1, 0), :]
        b = borders_at(C, i, documents, edges, masked)
        query, probe, rank = left[i, pl.ds(0, C), :], left[i, pl.ds(C, C), :], right[i, pl.ds(C, C), :]
        given = do[pl.ds(i * C, C), :]
        dtype, dS = given.dtype, decay[:, None] * dS
        scores = jnp.where(b.seen, dot(query, rank, turn_b=True), 0.0).astype(dtype)
        slope = dot(scores, given, turn_a=True) + dot(only(b.writes, rank), dS.astype(dtype))
        slope = dot(x[i], slope.astype(dtype), turn_a=True).astype(dtype)
        dS = kept(b.keeps, dS) + dot(only(b.reads, query), given, turn_a=True)
        return dS + dot(only(b.reads, probe), slope, turn_a=True), following

    out[...], _ = lax.fori_loop(0, n, body, (jnp.zeros(out.shape, FLOAT32), end[n - 1, :]))
