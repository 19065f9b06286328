"""Sequences cut into segments that are swept side by side, where heads and rows are too few to fill the GPU.

Of a delta rule a segment makes M S + A of the state S before it: A is what it makes of none, M that of the identity's columns without
values. Backward it is M^T dS + A, with A from no gradient behind it.

Shapes: as in tiles.py; N segments, which stand where rows do: [B N, T / N, ...].
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from smedjan_jax.kernels.tiles import FILLED, FLOAT32, SMALLEST, Launch, call, carried, numbers, of_head, partial

SHORTEST_SEGMENT = 512


def fill_segments(programs: int, T: int, wanted: int = FILLED) -> int:
    """Into how many segments of at least 512 positions sequences of T are cut, so that `programs` for a segment are `wanted` in all."""
    N = 1
    while programs * N < wanted and T // (2 * N) >= SHORTEST_SEGMENT:
        N *= 2
    return N


def segments_that_pay(programs: int, T: int) -> int:
    """Into how many segments sequences of T positions of a delta rule are cut, by heads and rows.

    Segments cost three sweeps more, which few of them do not earn. Gated DeltaNet's on an H200, forward and backward of 65,536 tokens: 16
    programs take 2.34 ms in four parts of V, 1.43 in 8 segments, 1.36 in 16; 64 programs take 1.24 in two parts, and some 1.4 in two
    segments.
    """
    N = fill_segments(programs, T, 2 * FILLED)
    return N if 2 * programs < FILLED and N > 2 else 1


def cut(x: jax.Array, N: int) -> jax.Array:
    """[B, T, ...] -> [B N, T / N, ...]."""
    return x.reshape(x.shape[0] * N, -1, *x.shape[2:])


def join(x: jax.Array, N: int) -> jax.Array:
    """[B N, T / N, ...] -> [B, T, ...]."""
    return x.reshape(x.shape[0] // N, -1, *x.shape[2:])


def segment_documents(documents: jax.Array | None, T: int, N: int, C: int) -> tuple[jax.Array, jax.Array] | None:
    """Documents of the segments' positions [B N, T / N], and of the states around their chunks [B N, n + 1]."""
    if documents is None:
        return None
    documents = jnp.pad(documents.astype(jnp.int32), ((0, 0), (0, T - documents.shape[1])), mode="edge")
    ends = documents.reshape(len(documents), N, -1)[:, :, -1]
    before = jnp.concatenate([documents[:, :1], ends[:, :-1]], axis=1).reshape(-1)
    parts = cut(documents, N)
    return numbers(parts, before, parts.shape[1], C)


def first_state(out: jax.Array, identity: bool, part: jax.Array | int) -> jax.Array:
    """What a segment's program starts from that leaves `out` [K, columns]: nothing, or part number `part` of the identity's columns."""
    if not identity:
        return jnp.zeros(out.shape, FLOAT32)
    row, column = (lax.broadcasted_iota(jnp.int32, out.shape, axis) for axis in (0, 1))
    return jnp.where(row == column + part * out.shape[1], 1.0, 0.0)


def joined(own: jax.Array, whole: jax.Array, state: jax.Array, N: int, back: bool = False) -> jax.Array:
    """The states before the segments [B N, H, K, V]; with `back` the gradients of those after them, from that of the last, `state`.

    own: A [B N, H, K, V], whole: M [B N, H, K, K], state [B, H, K, V], float32.
    """
    (B, H, K, V), parts = state.shape, state.shape[3] // SMALLEST  # the smallest: programs are few here

    def columns(size: int, parts: int) -> pl.BlockSpec:
        return pl.BlockSpec((N, None, K, size // parts), lambda b, h, p: (b, h, 0, p if parts > 1 else 0))

    kernel, outputs = partial(_join_kernel, N=N, back=back), [((B * N, H, K, V), FLOAT32, columns(V, parts))]
    specs = [columns(V, parts), columns(K, 1), of_head(K, V, parts)]
    return call(kernel, Launch(4, 1), (B, H, parts), [own, whole, state], specs, outputs)[0]


def _join_kernel(own, whole, state, out, *, N, back):
    def body(m, S):
        i = N - 1 - m if back else m
        out[i] = S
        return carried(whole[i], S, turn=back) + own[i]

    lax.fori_loop(0, N, body, state[...])
