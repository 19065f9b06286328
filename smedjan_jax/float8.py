"""Matrices as numbers of 8 bits and one scale, and their products (Micikevicius et al., 2022, with the scale of the matrix at hand).

    q(z) = z / s rounded to 8 bits,  s the power of two that brings the largest |z| just under the largest number of the format

E4M3 forward, E5M2 for gradients. A scale that is a power of two rounds nothing by itself. Tensor cores want the summed axis to be the minor
one of both matrices, so a matrix is kept as it lies or turned over, as its product sums.

Shapes: N rows, D columns.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from smedjan_common.errors import ConfigError

FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2
FORMS = "plain", "pallas"  # of rounding: by XLA, or by the kernels (kernels/float8.py), which give the same bits
# of a scale's exponent: it and its inverse are normal numbers, and no number over the largest scale is beyond the largest of a format
LIMIT = 120
INFINITE = 0x7F800000  # its bits
CAPABILITY = 9.0  # Hopper
SMALLEST_TILE = 64  # rows and columns that divide the sides of a matrix which the kernels round
LARGEST = 1 << 31  # numbers of it: Pallas counts the places of bytes in 32 bits up to twice as many


class Numbers(NamedTuple):
    """A matrix: rows [N, D] and turned [D, N] of 8 bits (None where nobody multiplies by it), and the float32 scale."""

    rows: Any
    turned: Any
    scale: jax.Array

    def lying(self) -> "Side":
        """To sum over D."""
        return self.rows, self.scale

    def over(self) -> "Side":
        """To sum over N."""
        return self.turned, self.scale


Side = tuple[jax.Array, jax.Array]  # of a product: numbers of 8 bits that are summed along the minor axis, and their scale


def fitting(form: str, *shapes: tuple[int, int]) -> str:
    """`form`, or the plain one where the kernels cannot round matrices of these shapes."""
    fits = all(not N % SMALLEST_TILE and not D % SMALLEST_TILE and N * D <= LARGEST for N, D in shapes)
    return form if fits or not form else "plain"


def quantised(x: jax.Array, to: Any) -> tuple[jax.Array, jax.Array]:
    """x in a float8 format, and the scale: x is about number * scale."""
    most = jnp.max(jnp.abs(x)).astype(jnp.float32)
    scale, inverse = scales(jax.lax.bitcast_convert_type(most, jnp.int32), to)
    return (x.astype(jnp.float32) * inverse).astype(to), scale


def scales(bits: jax.Array, to: Any) -> tuple[jax.Array, jax.Array]:
    """The scale and its inverse, float32, of a matrix the bits of whose largest magnitude, as a float32, are `bits`.

    As integers they compare as the numbers do, what is not finite above all; that stays so in the scale.
    """
    top = int(np.float32(jnp.finfo(to).max).view(np.int32))
    power = (bits >> 23) - (top >> 23) + ((bits & 0x7FFFFF) >= (top & 0x7FFFFF)).astype(jnp.int32)
    power = jnp.where(bits == 0, 0, jnp.clip(power, -LIMIT, LIMIT))
    scale = jnp.where(bits < INFINITE, (127 + power) << 23, bits)
    inverse = jnp.where(bits < INFINITE, (127 - power) << 23, jnp.where(bits == INFINITE, 0, bits))
    return jax.lax.bitcast_convert_type(scale, jnp.float32), jax.lax.bitcast_convert_type(inverse, jnp.float32)


def product(a: Side, b: Side, dtype: Any, exact: bool = False) -> jax.Array:
    """a b^T of matrices of 8 bits, times both scales, in `dtype`; sums are float32.

    XLA makes float8 matmuls of `number * scale` operands on GPUs that have them; elsewhere the same numbers are multiplied in `dtype`.
    exact: sums of float32 all along, as gradients want them; else tensor cores may keep fewer digits of a partial sum.
    """
    x, y = (number.astype(dtype) * scale.astype(dtype) for number, scale in (a, b))
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(x, y, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=dtype)


def obstacle() -> str:
    """Why float8 cannot run here; empty when it can."""
    device = jax.devices()[0]
    if device.platform not in ("gpu", "cuda"):
        return f"It needs an NVIDIA GPU from Hopper on (H100, H200, B200), and JAX runs on {device.device_kind} here."
    capability = str(getattr(device, "compute_capability", "") or "0")
    if float(capability.strip("abcdefgx")) < CAPABILITY:
        return f"It needs an NVIDIA GPU from Hopper on, compute capability {CAPABILITY}; {device.device_kind} has {capability}."
    return ""


def refuse_float8() -> None:
    """Raises ConfigError where there are no float8 matmuls."""
    if why := obstacle():
        raise ConfigError("--dtype float8 cannot run here.", why, "Take --dtype bfloat16 on a GPU, float32 on a CPU.")
