"""What the mixers of linear cost share, cutting into chunks, and what those with the delta rule share: borders of documents, products of
the compute dtype, and the scan over the chunks' states.

In a chunk everything is matmuls over all chunks at once. What is sequential is one recurrence per chunk of a state S [V, K],

    S' = S * keep + S M + A                keep [K] or a number, M [K, K] and A [V, K] of the chunk

whose M would lose the decay to rounding in bfloat16 if it held it; so `keep` is a factor by itself, in float32. A long sequence has too
many chunks for one after the other: groups of them run side by side. In each, the recurrence takes the identity along, which becomes the
product P of what its chunks do to a state, beside what they add to it, R; then S' = S P + R goes from group to group.

Shapes: N chunks of C positions, B batch, H heads, K and V key and value head size; chunked arrays are [B, H, N, C, K].
"""

from typing import NamedTuple

import mlx.core as mx

LONGEST_SCAN = 32  # chunks; more of them go in groups


class Borders(NamedTuple):
    """Which positions of a chunk share a document: with each other, with the chunk before, with the end of the chunk."""

    same: mx.array  # [B, 1, N, C, C] bool
    reads: mx.array  # [B, 1, N, C, 1] 1 where the state that comes in is of the position's document, else 0
    writes: mx.array  # [B, 1, N, C, 1] 1 where the state that goes out is
    keeps: mx.array  # [B, 1, N, 1, 1] 1 where both states are of one document


def borders(documents: mx.array | None, C: int) -> Borders:
    """Of document numbers [B, T] (None: one document)."""
    if documents is None:
        one = mx.ones((1, 1, 1, 1, 1), mx.float32)
        return Borders(one > 0, one, one, one)
    number = into_chunks(documents, C, edge=True)[:, None, :, :, None]
    last = number[..., -1:, :]
    before = mx.concatenate([number[:, :, :1, :1], last[:, :, :-1]], axis=2)
    wide = (each.astype(mx.float32) for each in (number == before, number == last, before == last))
    return Borders(number == number.swapaxes(-1, -2), *wide)


def into_chunks(x: mx.array, C: int, edge: bool = False) -> mx.array:
    """[B, T, ...] -> [B, N, C, ...]; positions that fill up the last chunk are zero (or the last one again)."""
    B, T = x.shape[:2]
    padded = mx.pad(x, [(0, 0), (0, -T % C)] + [(0, 0)] * (x.ndim - 2), mode="edge" if edge else "constant")
    return padded.reshape(B, -1, C, *x.shape[2:])


def cut(x: mx.array, C: int) -> mx.array:
    """[B, H, T, K] -> [B, H, N, C, K]; zeros fill the last chunk."""
    B, H, T, K = x.shape
    return into_chunks(x.reshape(B * H, T, K), C).reshape(B, H, -1, C, K)


def join(x: mx.array, T: int) -> mx.array:
    """[B, H, N, C, V] -> [B, H, T, V]."""
    B, H, N, C, V = x.shape
    return x.reshape(B, H, N * C, V)[:, :, :T]


def matmul(a: mx.array, b: mx.array, dtype: mx.Dtype) -> mx.array:
    """a @ b of float32 matrices that are rounded to the compute dtype; the matmuls of its gradient are of the same kind. It is summed in
    float32, and returned in it, but bfloat16 operands give a sum that is rounded to bfloat16: MLX has no other product."""
    return (a.astype(dtype) @ b.astype(dtype)).astype(mx.float32)


def running_sum(x: mx.array, upto: mx.array) -> mx.array:
    """Sums [..., C, K] over the positions that `upto` [..., C, C] allows each: of its document only, so that no other's rounding enters."""
    return upto.astype(x.dtype) @ x


def scan_states(state: mx.array, keep: mx.array, change: mx.array, add: mx.array, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """States before every chunk in the compute dtype [B, H, N, V, K], and the float32 one after the last [B, H, V, K].

    S' = S * keep + S change + add, from `state` [B, H, V, K] on; keep, change and add lie along the chunks N.
    """
    N, K = add.shape[2], add.shape[-1]
    keep = mx.broadcast_to(keep, (*keep.shape[:2], N, *keep.shape[3:]))
    if N <= LONGEST_SCAN:
        return _scan(state, keep, change, add, dtype)
    g = group_size(N)
    keep, change, add = (_grouped(each, g, fill) for each, fill in ((keep, 1.0), (change, 0.0), (add, 0.0)))
    B, H, groups, V = *add.shape[:2], add.shape[3], add.shape[-2]
    identity = mx.broadcast_to(mx.eye(K), (B, H, groups, K, K))
    start = mx.concatenate([identity, mx.zeros((B, H, groups, V, K))], axis=-2)
    added = mx.concatenate([mx.zeros((B, H, g, groups, K, K)), add], axis=-2)
    before, after = _scan(start, keep, change, added, dtype)
    S, first = state, []
    for group in mx.split(after, groups, axis=2):
        first.append(S)
        S = S @ group[:, :, 0, :K] + group[:, :, 0, K:]
    states = matmul(mx.stack(first, axis=2)[:, :, None], before[..., :K, :], dtype) + before[..., K:, :].astype(mx.float32)
    return states.astype(dtype).swapaxes(2, 3).reshape(B, H, -1, V, K)[:, :, :N], S


def group_size(chunks: int) -> int:
    """Chunks of a group: about as many as there are groups."""
    return 1 << (chunks.bit_length() // 2)


def _scan(state: mx.array, keep: mx.array, change: mx.array, add: mx.array, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    N, S, states = add.shape[2], state, []
    # split and not sliced: the gradient of N slices would be N arrays of full size
    for chunk in zip(*(mx.split(each, N, axis=2) for each in (keep, change, add)), strict=True):
        keep_n, change_n, add_n = (each[:, :, 0] for each in chunk)
        states.append(S.astype(dtype))
        S = S * keep_n + matmul(S, change_n, dtype) + add_n
    return mx.stack(states, axis=2), S


def _grouped(x: mx.array, g: int, fill: float) -> mx.array:
    """[B, H, N, ...] -> [B, H, g, groups, ...]; `fill` makes chunks at the end that change nothing."""
    widths = [(0, 0), (0, 0), (0, -x.shape[2] % g), *[(0, 0)] * (x.ndim - 3)]
    padded = mx.pad(x, widths, constant_values=fill)
    return padded.reshape(*x.shape[:2], -1, g, *x.shape[3:]).swapaxes(2, 3)
