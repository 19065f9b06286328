"""Powers, roots and what is made of them, by the one instruction that a GPU has for each.

XLA compiles jnp.exp2 and lax.rsqrt to that instruction and three more, which keep numbers below 2^-126 from becoming 0, and jnp.exp to
eight more. What these kernels make of powers and roots are decays, gates and norms, to which 0 is as good. A fifth of the instructions of
RWKV-7's tiles were those.
"""

import jax
import jax.numpy as jnp
from jax import lax

from smedjan_jax.kernels.compat import plgpu

LOG2_E = 1.4426950408889634


def exp2(x: jax.Array) -> jax.Array:
    """2^x, float32; 0 below 2^-126. It has no derivative: `exp` has."""
    return jnp.exp2(x) if _plain(x) else _instruction("ex2.approx.ftz.f32", x)


@jax.custom_jvp
def exp(x: jax.Array) -> jax.Array:
    """e^x."""
    return exp2(x * LOG2_E)


@exp.defjvp
def _exp_jvp(primals, tangents):
    y = exp(primals[0])
    return y, tangents[0] * y


@jax.custom_jvp
def rsqrt(x: jax.Array) -> jax.Array:
    """1 / sqrt(x), float32, of numbers from 2^-126 on."""
    return lax.rsqrt(x) if _plain(x) else _instruction("rsqrt.approx.ftz.f32", x)


@rsqrt.defjvp
def _rsqrt_jvp(primals, tangents):
    y = rsqrt(primals[0])
    return y, tangents[0] * (-0.5 * y * y * y)


@jax.custom_jvp
def sigmoid(x: jax.Array) -> jax.Array:
    """1 / (1 + e^-x), float32, with a reciprocal of one instruction where a division takes a dozen; the last bit may be another."""
    y = 1 + exp2(x * -LOG2_E)
    return 1 / y if _plain(x) else _instruction("rcp.approx.ftz.f32", y)


@sigmoid.defjvp
def _sigmoid_jvp(primals, tangents):
    y = sigmoid(primals[0])
    return y, tangents[0] * (y * (1 - y))


@jax.custom_jvp
def silu(x: jax.Array) -> jax.Array:
    """x sigmoid(x)."""
    return x * sigmoid(x)


@silu.defjvp
def _silu_jvp(primals, tangents):
    gate = sigmoid(primals[0])
    active = primals[0] * gate
    return active, tangents[0] * (gate + active * (1 - gate))


def wide(x: jax.Array) -> jax.Array:
    """bfloat16 as float32. Triton computes what a conversion leads to once more for each layout that it is needed in, instead of moving
    it; what it cannot read it does not compute twice."""
    if _plain(x) or x.dtype != jnp.bfloat16:
        return x.astype(jnp.float32)
    return _inline("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", x, pack=2)


def _plain(x: jax.Array) -> bool:
    """Scalars, and where kernels are interpreted."""
    return x.ndim == 0 or jax.default_backend() == "cpu"


def _instruction(name: str, x: jax.Array) -> jax.Array:
    return _inline(f"{name} $0, $1;", "=f,f", x)


def _inline(code: str, constraints: str, x: jax.Array, pack: int = 1) -> jax.Array:
    """What PTX makes of `pack` numbers of x at a time, float32."""
    like = [jax.ShapeDtypeStruct(x.shape, jnp.float32)]
    return plgpu.elementwise_inline_asm(code, args=[x], constraints=constraints, pack=pack, result_shape_dtypes=like)[0]
