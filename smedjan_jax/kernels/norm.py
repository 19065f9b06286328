"""The residual stream divided by its root mean square, one kernel each way, where the norm's weight lies in the matrices that read it.

    u = x / sqrt(mean(x^2) + eps)        dx = ds + r (du - u mean(u du)),  r = 1 / sqrt(mean(x^2) + eps)

(W diag(w)) u is W (w u): so the gradient of w is a sum over a matrix, not over the positions, and the gradient ds of the residual itself is
added where dx is written. u and r are kept, not x, over which the product before it may then add its own.

Shapes: N positions, D width, a power of two.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from smedjan_jax.kernels.tiles import FLOAT32, Launch, call, partial

VALUES, LAUNCH = 4096, Launch(4, 1)  # numbers of a program


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def normalized(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """x [..., D] as it is, to go on with, and normalised."""
    return _forward(x, eps)[0]


@functools.partial(jax.jit, static_argnums=1)  # lowered once for all layers
def _forward(x: jax.Array, eps: float) -> Any:
    (N, D), R, tile, number = _tiles(x)
    outputs = [((N, D), x.dtype, tile), ((N,), FLOAT32, number)]
    unit, scale = call(partial(_norm_kernel, eps=eps), LAUNCH, (N // R,), [x.reshape(N, D)], [tile], outputs)
    return (x, unit.reshape(x.shape)), (unit, scale)


@functools.partial(jax.jit, static_argnums=0)
def _backward(eps: float, kept: tuple[jax.Array, jax.Array], gradients: tuple[jax.Array, jax.Array]) -> tuple[jax.Array]:
    (unit, scale), (ds, du) = kept, gradients
    (N, D), R, tile, number = _tiles(unit)
    inputs, specs = [unit, scale, du.reshape(N, D), ds.reshape(N, D)], [tile, number, tile, tile]
    (dx,) = call(_norm_back_kernel, LAUNCH, (N // R,), inputs, specs, [((N, D), unit.dtype, tile)])
    return (dx.reshape(ds.shape),)


normalized.defvjp(_forward, _backward)


def _tiles(x: jax.Array) -> tuple[tuple[int, int], int, pl.BlockSpec, pl.BlockSpec]:
    """(N, D), the positions of a program, and the blocks of [N, D] and [N]."""
    D = x.shape[-1]
    N = x.size // D
    R = math.gcd(max(1, VALUES // D), N)
    return (N, D), R, pl.BlockSpec((R, D), lambda i: (i, 0)), pl.BlockSpec((R,), lambda i: (i,))


def _norm_kernel(x, unit, scale, *, eps):
    wide = x[...].astype(FLOAT32)
    r = lax.rsqrt(jnp.sum(wide * wide, axis=1) / wide.shape[1] + eps)
    unit[...] = (wide * r[:, None]).astype(unit.dtype)
    scale[...] = r


def _norm_back_kernel(unit, scale, du, ds, dx):
    u, d = unit[...].astype(FLOAT32), du[...].astype(FLOAT32)
    change = scale[...][:, None] * (d - u * (jnp.sum(u * d, axis=1) / u.shape[1])[:, None])
    dx[...] = (ds[...].astype(FLOAT32) + change).astype(dx.dtype)
