"""The product of a linear map, y = x W^T, where it is more than a matmul: of matrices that lie split over devices, and in float8.

Split (`Shard`): each device keeps a part of W. It is gathered where it is multiplied and gathered again for the backward pass, so no
device holds the whole matrices of all layers at once (ZeRO-3, Rajbhandari et al., 2020). Gradients are summed over the devices in
float32 and split again.

float8 (Micikevicius et al., 2022, with the scale of the tensor at hand): with q(z) = z / s rounded to 8 bits, s the power of two that
brings the largest |z| just under the largest number of the format,

    y = (q4(x) q4(W)^T) s_x s_W        dx = (q5(dy) q4(W)) s_dy s_W        dW = (q5(dy)^T q4(x)) s_dy s_x

q4 is E4M3, q5 is E5M2. Sums are float32 and rounded to the dtype of x. A scale that is a power of two rounds nothing by itself. Nothing
is kept from step to step, so a run that goes on repeats every bit. W is quantised once for the three products, x too, and the backward
pass keeps them in 8 bits. XLA makes float8 matmuls of `number * scale` operands on GPUs that have them; elsewhere the same numbers are
multiplied in the dtype of x, which is how the tests run it.

Shapes: x [..., in], W [out, in].
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from smedjan_common.errors import ConfigError
from smedjan_jax.quantized import Quantized

FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2
CAPABILITY = 9.0  # Hopper
LIMIT = 100  # of a scale's exponent: it and its inverse are normal numbers


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shard:
    """This device's part of a matrix that is split over fsdp.

    dimension: which is split. dtype: in which it travels. again: gathered anew for the backward pass; not where a block is computed
    anew as a whole.
    """

    array: jax.Array
    dimension: int = field(metadata={"static": True})
    dtype: Any = field(metadata={"static": True})
    again: bool = field(default=True, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole matrix."""
        devices = jax.sharding.get_abstract_mesh().shape["fsdp"]
        return tuple(size * devices if at == self.dimension else size for at, size in enumerate(self.array.shape))


Weight = jax.Array | Shard
Scaled = tuple[jax.Array, jax.Array]  # numbers of 8 bits, and the float32 scale


def linear(x: jax.Array, weights: Sequence[Weight | Quantized], float8: bool = False) -> jax.Array:
    """x W^T, W being the weights one under the other."""
    weights = [weight.astype(x.dtype) if isinstance(weight, Quantized) else weight for weight in weights]
    if float8 or any(isinstance(weight, Shard) for weight in weights):
        return _linear(float8, x, tuple(weights))
    return x @ _joined(tuple(weights), x.dtype).T


def whole(weight: Weight) -> jax.Array:
    """All of a matrix, which then stays for the backward pass."""
    return gather(weight.array, weight.dimension, weight.dtype) if isinstance(weight, Shard) else weight


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather(part: jax.Array, dimension: int, dtype: Any) -> jax.Array:
    """The whole of a matrix that is split over fsdp. Its gradient is summed in float32, whatever dtype it was used in."""
    return jax.lax.all_gather(part.astype(dtype), "fsdp", axis=dimension, tiled=True)


def _scatter(grad: jax.Array, dimension: int) -> jax.Array:
    return jax.lax.psum_scatter(grad.astype(jnp.float32), "fsdp", scatter_dimension=dimension, tiled=True)


gather.defvjp(
    lambda part, dimension, dtype: (gather(part, dimension, dtype), None),
    lambda dimension, dtype, _, grad: (_scatter(grad, dimension),),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(float8: bool, x: jax.Array, weights: tuple[Weight, ...]) -> jax.Array:
    return _forward(float8, x, weights)[0]


def _forward(float8: bool, x: jax.Array, weights: tuple[Weight, ...]) -> tuple[jax.Array, Any]:
    weight, like = _joined(weights, x.dtype), jnp.zeros((0,), x.dtype)
    if not float8:
        return x @ weight.T, (x, weights, None, like)
    x8, weight8 = quantised(_flat(x), FORWARD), quantised(weight, FORWARD)
    y = _product(x8, weight8, ((1,), (1,)), x.dtype).reshape(*x.shape[:-1], -1)
    return y, (x8, weights, None if _again(weights) else weight8, like)


def _backward(float8: bool, saved: Any, dy: jax.Array) -> tuple[jax.Array, tuple[Weight, ...]]:
    x, weights, weight, like = saved
    if _again(weights):
        # behind the barrier it is another gather than the forward pass's, and none that could begin before its turn
        weights, dy = jax.lax.optimization_barrier((weights, dy))
    if not float8:
        rows = tuple(range(dy.ndim - 1))
        dx, dweight = dy @ _joined(weights, like.dtype), jax.lax.dot_general(dy, x, ((rows, rows), ((), ())))
        return dx, _parted(dweight, weights)
    weight, dy8 = weight or quantised(_joined(weights, like.dtype), FORWARD), quantised(_flat(dy), BACKWARD)
    dx = _product(dy8, weight, ((1,), (0,)), like.dtype, exact=True).reshape(*dy.shape[:-1], -1)
    return dx, _parted(_product(dy8, x, ((0,), (0,)), like.dtype, exact=True), weights)


_linear.defvjp(_forward, _backward)


def _flat(x: jax.Array) -> jax.Array:
    """A matrix of all rows, as XLA wants the operands of a float8 matmul."""
    return x.reshape(-1, x.shape[-1])


def _again(weights: tuple[Weight, ...]) -> bool:
    return any(isinstance(weight, Shard) and weight.again for weight in weights)


def _joined(weights: tuple[Weight, ...], dtype: Any) -> jax.Array:
    found = [whole(weight) for weight in weights]
    return (found[0] if len(found) == 1 else jnp.concatenate(found)).astype(dtype)


def _parted(grad: jax.Array, weights: tuple[Weight, ...]) -> tuple[Weight, ...]:
    """The gradient of each weight, in float32: of a part, summed over the devices and this device's part of it."""
    found, at = [], 0
    for weight in weights:
        own = grad[at : at + weight.shape[0]].astype(jnp.float32)
        at += weight.shape[0]
        if isinstance(weight, Shard):
            found.append(Shard(_scatter(own, weight.dimension), weight.dimension, weight.dtype, weight.again))
        else:
            found.append(own.astype(weight.dtype))
    return tuple(found)


def quantised(x: jax.Array, dtype: Any) -> Scaled:
    """x in a float8 format, and the scale: x is about number * scale."""
    largest = float(jnp.finfo(dtype).max)
    most = jnp.max(jnp.abs(x)).astype(jnp.float32)
    scale = jnp.ldexp(jnp.float32(1), jnp.clip(jnp.frexp(most / largest)[1], -LIMIT, LIMIT))
    scale = jnp.where(jnp.isfinite(most), scale, most)  # what is not finite stays so
    return jnp.clip(x.astype(jnp.float32) / scale, -largest, largest).astype(dtype), scale


def _product(a: Scaled, b: Scaled, dimensions: tuple, dtype: Any, exact: bool = False) -> jax.Array:
    """exact: sums of float32 all along, as gradients want them; else tensor cores may keep fewer digits of a partial sum."""
    (a8, a_scale), (b8, b_scale) = a, b
    wide = a8.astype(dtype) * a_scale.astype(dtype), b8.astype(dtype) * b_scale.astype(dtype)
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(*wide, (dimensions, ((), ())), precision=precision, preferred_element_type=dtype)
