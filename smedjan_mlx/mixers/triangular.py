"""Inverse of unit lower triangular matrices by block doubling: float32, exact structure, no solver.

    [ A  0 ]^-1   [    A^-1        0  ]
    [ M  D ]    = [ -D^-1 M A^-1  D^-1 ]        neighbouring inverses of size b give one of size 2b

Small blocks, up to BASE, are doubled together as masked BASE x BASE matrices, since matmuls of 1 to 8 rows would cost more than they
save; from there only the blocks that are needed are multiplied. Products of powers, (I - M)(I + M^2)(I + M^4) …, are shorter
but lose every digit where keys repeat. The gradient is closed: X = (I + M)^-1 gives dM = -X^T dX X^T, strictly lower.

Shapes: C rows of a matrix, b rows of a block, n blocks.
"""

from typing import Any

import mlx.core as mx

BASE = 16


def unit_lower_inverse(m: mx.array) -> mx.array:
    """(I + M)^-1 in float32, where M is the strictly lower part of m [..., C, C], any C."""
    return _inverse(mx.tril(m.astype(mx.float32), -1))


def _doubling(m: mx.array) -> mx.array:
    C, b = m.shape[-1], min(BASE, _power_of_two(m.shape[-1]))
    size = b * _power_of_two(-(-C // b))
    padded = mx.pad(m, [(0, 0)] * (m.ndim - 2) + [(0, size - C)] * 2)
    x = _small_inverse(_blocks(padded, b, 0))
    while b < size:
        upper, lower = x[..., 0::2, :, :], x[..., 1::2, :, :]
        corner = -(lower @ _blocks(padded, b, 1) @ upper)
        right = mx.concatenate([mx.zeros_like(upper), lower], axis=-2)
        x = mx.concatenate([mx.concatenate([upper, corner], axis=-2), right], axis=-1)
        b *= 2
    return x[..., 0, :C, :C]


def _backward(m: mx.array, dx: mx.array, x: mx.array) -> mx.array:
    transposed = x.swapaxes(-1, -2)
    return -mx.tril(transposed @ dx @ transposed, -1)


_inverse: Any = mx.custom_function(_doubling)
_inverse.vjp(_backward)


def _small_inverse(m: mx.array) -> mx.array:
    """The inverses of I + m for m [..., b, b], whole matrices at every doubling."""
    b = m.shape[-1]
    x, half, row = mx.broadcast_to(mx.eye(b, dtype=m.dtype), m.shape), 1, mx.arange(b)
    while half < b:
        odd = (row // half) % 2 == 1
        corner = odd[:, None] & (row[:, None] // (2 * half) == row // (2 * half)) & ~odd
        x = x - x @ mx.where(corner, m, 0.0) @ x
        half *= 2
    return x


def _blocks(m: mx.array, b: int, below: int) -> mx.array:
    """Blocks [..., n, b, b] of m: those on the diagonal, or (below = 1) the lower left ones of its blocks of size 2b."""
    width, n = b * (1 + below), m.shape[-1] // (b * (1 + below))
    tiles = m.reshape(*m.shape[:-2], n, width, n, width)[..., b * below :, :, :b]
    return mx.moveaxis(mx.diagonal(tiles, axis1=-4, axis2=-2), -1, -3)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
