"""Sequences cut into segments that are swept side by side, where heads and rows are too few to fill the GPU.

Shapes: as in tiles.py; N segments.
"""

import jax
import jax.numpy as jnp

from smedjan_jax.kernels.tiles import FILLED, numbers

SHORTEST_SEGMENT = 512


def fill_segments(programs: int, T: int, wanted: int = FILLED) -> int:
    """Into how many segments of at least 512 positions sequences of T are cut, so that `programs` for a segment are `wanted` in all."""
    N = 1
    while programs * N < wanted and T // (2 * N) >= SHORTEST_SEGMENT:
        N *= 2
    return N


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
