"""What the mixers of linear cost share, cutting into chunks, and what those with the delta rule share: borders of documents, products of
the compute dtype, and the scan over the chunks' states.

In a chunk everything is matmuls over all chunks at once. What is sequential is one recurrence per chunk of a state S [V, K],

    S' = S * keep + S M + A                keep [K] or a number, M [K, K] and A [V, K] of the chunk

whose M would lose the decay to rounding in bfloat16 if it held it; so `keep` is a factor by itself, in float32. A long sequence has too
many chunks for one after the other: groups of them run side by side. In each, the recurrence takes the identity along, which becomes the
product P of what its chunks do to a state, beside what they add to it, R; then S' = S P + R goes from group to group.

Shapes: N chunks of C positions, B batch, H heads, K and V key and value head size; chunked arrays are [N, B, H, C, K].
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

LONGEST_SCAN = 32  # chunks; more of them go in groups


class Borders(NamedTuple):
    """Which positions of a chunk share a document: with each other, with the chunk before, with the end of the chunk."""

    same: jax.Array  # [N, B, 1, C, C] bool
    reads: jax.Array  # [N, B, 1, C, 1] 1 where the state that comes in is of the position's document, else 0
    writes: jax.Array  # [N, B, 1, C, 1] 1 where the state that goes out is
    keeps: jax.Array  # [N, B, 1, 1, 1] 1 where both states are of one document


def borders(documents: jax.Array | None, C: int) -> Borders:
    """Of document numbers [B, T] (None: one document)."""
    if documents is None:
        one = jnp.ones((1, 1, 1, 1, 1), jnp.float32)
        return Borders(one > 0, one, one, one)
    number = into_chunks(documents, C, edge=True)[:, :, None, :, None].swapaxes(0, 1)
    last = number[..., -1:, :]
    before = jnp.concatenate([number[:1, ..., :1, :], last[:-1]])
    wide = (each.astype(jnp.float32) for each in (number == before, number == last, before == last))
    return Borders(number == number.swapaxes(-1, -2), *wide)


def into_chunks(x: jax.Array, C: int, edge: bool = False) -> jax.Array:
    """[B, T, ...] -> [B, N, C, ...]; positions that fill up the last chunk are zero (or the last one again)."""
    B, T = x.shape[:2]
    padded = jnp.pad(x, ((0, 0), (0, -T % C), *((0, 0),) * (x.ndim - 2)), mode="edge" if edge else "constant")
    return padded.reshape(B, -1, C, *x.shape[2:])


def cut(x: jax.Array, C: int) -> jax.Array:
    """[B, T, H, K] -> [N, B, H, C, K]; zeros fill the last chunk."""
    return into_chunks(x, C).transpose(1, 0, 3, 2, 4)


def join(x: jax.Array, T: int) -> jax.Array:
    """[N, B, H, C, V] -> [B, T, H, V]."""
    N, B, H, C, V = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(B, N * C, H, V)[:, :T]


def matmul(a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """a @ b in float32, of float32 matrices that are rounded to the compute dtype; the matmuls of its gradient are of the same kind."""
    return _matmul(a, b, dtype)


def _rounded_matmul(a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jnp.matmul(a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32)


def _matmul_forward(a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _rounded_matmul(a, b, dtype), (a.astype(dtype), b.astype(dtype))


def _matmul_backward(dtype: jnp.dtype, operands: tuple[jax.Array, jax.Array], out: jax.Array) -> tuple[jax.Array, jax.Array]:
    a, b = operands
    return _rounded_matmul(out, b.swapaxes(-1, -2), dtype), _rounded_matmul(a.swapaxes(-1, -2), out, dtype)


_matmul: Any = jax.custom_vjp(_rounded_matmul, nondiff_argnums=(2,))
_matmul.defvjp(_matmul_forward, _matmul_backward)


def running_sum(x: jax.Array, upto: jax.Array) -> jax.Array:
    """Sums [..., C, K] over the positions that `upto` [..., C, C] allows each: of its document only, so that no other's rounding enters."""
    return jnp.matmul(upto.astype(x.dtype), x, precision=jax.lax.Precision.HIGHEST)


def scan_states(state: jax.Array, keep: jax.Array, change: jax.Array, add: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """States before every chunk in the compute dtype [N, B, H, V, K], and the float32 one after the last [B, H, V, K].

    S' = S * keep + S change + add, from `state` [B, H, V, K] on; keep, change and add lie along the chunks N.
    """
    N, K = len(add), add.shape[-1]
    keep = jnp.broadcast_to(keep, (N, *keep.shape[1:]))
    if N <= LONGEST_SCAN:
        return _scan(state, keep, change, add, dtype)
    g = group_size(N)
    keep, change, add = (_grouped(each, g, fill) for each, fill in ((keep, 1.0), (change, 0.0), (add, 0.0)))
    identity = jnp.broadcast_to(jnp.eye(K), (*add.shape[1:-2], K, K))
    start = jnp.concatenate([identity, jnp.zeros_like(add[0])], axis=-2)
    added = jnp.concatenate([jnp.zeros_like(jnp.broadcast_to(identity, (g, *identity.shape))), add], axis=-2)
    before, after = _scan(start, keep, change, added, dtype)

    def next_group(S: jax.Array, group: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.matmul(S, group[..., :K, :], precision=jax.lax.Precision.HIGHEST) + group[..., K:, :], S

    last, first = jax.lax.scan(next_group, state, after)
    before = before.astype(jnp.float32)
    states = matmul(jnp.broadcast_to(first, (g, *first.shape)), before[..., :K, :], dtype) + before[..., K:, :]
    return states.astype(dtype).swapaxes(0, 1).reshape(-1, *states.shape[2:])[:N], last


def group_size(chunks: int) -> int:
    """Chunks of a group: about as many as there are groups."""
    return 1 << (chunks.bit_length() // 2)


def _scan(state: jax.Array, keep: jax.Array, change: jax.Array, add: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    def advance(S: jax.Array, chunk: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        keep, change, add = chunk
        return S * keep + matmul(S, change, dtype) + add, S.astype(dtype)

    last, states = jax.lax.scan(advance, state, (keep, change, add))
    return states, last


def _grouped(x: jax.Array, g: int, fill: float) -> jax.Array:
    """[N, ...] -> [g, groups, ...]; `fill` makes chunks at the end that change nothing."""
    padded = jnp.pad(x, ((0, -len(x) % g), *((0, 0),) * (x.ndim - 1)), constant_values=fill)
    return padded.reshape(-1, g, *x.shape[1:]).swapaxes(0, 1)
