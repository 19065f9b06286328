"""Inverse of unit lower triangular matrices by block doubling: float32, exact structure, no solver.

    [ A  0 ]^-1   [    A^-1        0  ]
    [ M  D ]    = [ -D^-1 M A^-1  D^-1 ]        neighbouring inverses of size b give one of size 2b

Small blocks, up to BASE, are doubled together as masked BASE x BASE matrices, since matmuls of 1 to 8 rows would cost more than they
save; from there only the blocks that are needed are multiplied. Products of powers, (I - M)(I + M^2)(I + M^4) …, are shorter
but lose every digit where keys repeat. The gradient is closed: X = (I + M)^-1 gives dM = -X^T dX X^T, strictly lower.

Shapes: C rows of a matrix, b rows of a block, n blocks.
"""

from typing import Any

import jax
import jax.numpy as jnp

BASE = 16


def unit_lower_inverse(m: jax.Array) -> jax.Array:
    """(I + M)^-1 in float32, where M is the strictly lower part of m [..., C, C], any C."""
    return _inverse(jnp.tril(m.astype(jnp.float32), -1))


def _doubling(m: jax.Array) -> jax.Array:
    C, b = m.shape[-1], min(BASE, _power_of_two(m.shape[-1]))
    size = b * _power_of_two(-(-C // b))
    padded = jnp.pad(m, [(0, 0)] * (m.ndim - 2) + [(0, size - C)] * 2)
    x = _small_inverse(_blocks(padded, b, 0))
    while b < size:
        upper, lower = x[..., 0::2, :, :], x[..., 1::2, :, :]
        corner = -_matmul(_matmul(lower, _blocks(padded, b, 1)), upper)
        right = jnp.concatenate([jnp.zeros_like(upper), lower], axis=-2)
        x = jnp.concatenate([jnp.concatenate([upper, corner], axis=-2), right], axis=-1)
        b *= 2
    return x[..., 0, :C, :C]


def _forward(m: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = _doubling(m)
    return x, x


def _backward(x: jax.Array, dx: jax.Array) -> tuple[jax.Array]:
    transposed = x.swapaxes(-1, -2)
    return (-jnp.tril(_matmul(_matmul(transposed, dx), transposed), -1),)


_inverse: Any = jax.custom_vjp(_doubling)
_inverse.defvjp(_forward, _backward)


def _small_inverse(m: jax.Array) -> jax.Array:
    """The inverses of I + m for m [..., b, b], whole matrices at every doubling."""
    b = m.shape[-1]
    x, half, row = jnp.broadcast_to(jnp.eye(b, dtype=m.dtype), m.shape), 1, jnp.arange(b)
    while half < b:
        odd = (row // half) % 2 == 1
        corner = odd[:, None] & (row[:, None] // (2 * half) == row // (2 * half)) & ~odd
        x = x - _matmul(_matmul(x, jnp.where(corner, m, 0.0)), x)
        half *= 2
    return x


def _blocks(m: jax.Array, b: int, below: int) -> jax.Array:
    """Blocks [..., n, b, b] of m: those on the diagonal, or (below = 1) the lower left ones of its blocks of size 2b."""
    width, n = b * (1 + below), m.shape[-1] // (b * (1 + below))
    tiles = m.reshape(*m.shape[:-2], n, width, n, width)[..., b * below :, :, :b]
    return jnp.moveaxis(jnp.diagonal(tiles, axis1=-4, axis2=-2), -1, -3)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
