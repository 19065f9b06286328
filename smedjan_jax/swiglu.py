"""SwiGLU in float8 with its kernels, from the input of the first product to the output of the last.

    [g, u] = x W^T        h = silu(g) u        y = h V^T

with every product as in products.py. Neither h nor the gradients of g and u are written in the dtype of x: each is made twice of what it
is made from, for its largest and for its numbers of 8 bits (kernels/float8.py). Backward keeps g and u, and x, h, W, V in 8 bits.

Shapes: x [..., D], W [2 F, D] (gate over up), V [D, F].
"""

from typing import Any

import jax

from smedjan_jax.float8 import BACKWARD, FORWARD, fitting, product
from smedjan_jax.kernels import float8 as kernels
from smedjan_jax.products import Weight, flat, joined_numbers, numbers, parted

Weights = tuple[Weight, Weight]  # of gate and up


def fits(x: jax.Array, gate: jax.Array) -> bool:
    """Whether the kernels can round what is made of such matrices."""
    (N, D), F = flat(x).shape, gate.shape[0]
    return fitting("pallas", (N, D), (N, 2 * F), (F, D)) == "pallas"


@jax.custom_vjp
def swiglu_by_kernels(x: jax.Array, inner: Weights, outer: jax.Array) -> jax.Array:
    """y, of x, the weights of gate and up, and V."""
    return _forward(x, inner, outer, turned=False)[0]


def _forward(x: jax.Array, inner: Weights, outer: jax.Array, turned: bool = True) -> tuple[jax.Array, Any]:
    x8 = numbers(flat(x), FORWARD, "pallas", turned=turned)
    inner8, outer8 = (joined_numbers("pallas", weights, x.dtype, turned) for weights in (inner, (outer,)))
    gates = product(x8.lying(), inner8.lying(), x.dtype)
    h8 = kernels.numbers(kernels.SWIGLU, (gates, gates), FORWARD, x.dtype, turned)
    y = product(h8.lying(), outer8.lying(), x.dtype).reshape(x.shape)
    return y, (x8.over(), inner8.over(), gates, h8.over(), outer8.over(), inner, outer)


def _backward(saved: Any, dy: jax.Array) -> tuple[jax.Array, Weights, jax.Array]:
    x8, inner8, gates, h8, outer8, inner, outer = saved
    dtype, dy8 = dy.dtype, numbers(flat(dy), BACKWARD, "pallas")
    dh = product(dy8.lying(), outer8, dtype, exact=True)
    d_outer = product(dy8.over(), h8, dtype, exact=True)
    dgates8 = kernels.numbers(kernels.SWIGLU_BACK, (gates, gates, dh), BACKWARD, dtype)
    dx = product(dgates8.lying(), inner8, dtype, exact=True).reshape(dy.shape)
    d_gate, d_up = parted(product(dgates8.over(), x8, dtype, exact=True), inner)
    return dx, (d_gate, d_up), d_outer.astype(outer.dtype)


swiglu_by_kernels.defvjp(_forward, _backward)
