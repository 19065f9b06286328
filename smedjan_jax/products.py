"""The product of a linear map, y = x W^T, where it is more than a matmul: of matrices that lie split over devices, and in float8.

Split (`Shard`): each device keeps a part of W. It is gathered where it is multiplied and gathered again for the backward pass, so no
device holds the whole matrices of all layers at once (ZeRO-3, Rajbhandari et al., 2020). Gradients are summed over the devices in
float32 and split again.

In float8 (smedjan_jax/float8.py), q4 and q5 giving numbers of 8 bits and a scale s:

    y = (q4(x) q4(W)^T) s_x s_W        dx = (q5(dy) q4(W)) s_dy s_W        dW = (q5(dy)^T q4(x)) s_dy s_x

Sums are float32 and rounded to the dtype of x. Nothing is kept from step to step, so a run that goes on repeats every bit. W is quantised
once for the three products, x too, and the backward pass keeps them in 8 bits.

Shapes: x [..., in], W [out, in].
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from smedjan_jax.float8 import BACKWARD, FORWARD, Numbers, fitting, product, quantised
from smedjan_jax.quantized import Quantized


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


def linear(x: jax.Array, weights: Sequence[Weight | Quantized], float8: str = "") -> jax.Array:
    """x W^T, W being the weights one under the other. float8: in it, by one of float8.FORMS; empty: in the dtype of x."""
    weights = [weight.astype(x.dtype) if isinstance(weight, Quantized) else weight for weight in weights]
    if float8 or any(isinstance(weight, Shard) for weight in weights):
        (N, D), outputs = flat(x).shape, sum(weight.shape[0] for weight in weights)
        return _linear(fitting(float8, (N, D), (N, outputs), (outputs, D)), x, tuple(weights))
    return x @ _joined(tuple(weights), x.dtype).T


def copies(x: jax.Array, count: int) -> tuple[jax.Array, ...]:
    """x for each of `count` products. Backward, every product but the first adds its gradient to those of the ones before.

    Of a sum in the order that differentiation gives it XLA makes every second addition a pass of its own, 0.05 ms for 65,536 rows of
    `medium` on an H200, since a matmul that adds one array takes no other. Take the first for whose gradient is known first.
    """
    return _copies(x, count)


def whole(weight: Weight) -> jax.Array:
    """All of a matrix, which then stays for the backward pass."""
    return gather(weight.array, weight.dimension, weight.dtype) if isinstance(weight, Shard) else weight


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _copies(x: jax.Array, count: int) -> Any:
    return (x,) * count


def _added(count: int, _: None, grads: tuple[jax.Array, ...]) -> tuple[jax.Array]:
    total = grads[0]
    for own in grads[1:]:
        total = own + total
    return (total,)


_copies.defvjp(lambda x, count: (_copies(x, count), None), _added)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(float8: str, x: jax.Array, weights: tuple[Weight, ...]) -> jax.Array:
    return _forward(float8, x, weights, turned=False)[0]


def _forward(float8: str, x: jax.Array, weights: tuple[Weight, ...], turned: bool = True) -> tuple[jax.Array, Any]:
    like = jnp.zeros((0,), x.dtype)
    if not float8:
        weight = _joined(weights, x.dtype)
        return x @ weight.T, (x, weights, None, like)
    x8, weight8 = numbers(flat(x), FORWARD, float8, turned=turned), joined_numbers(float8, weights, x.dtype, turned)
    y = product(x8.lying(), weight8.lying(), x.dtype).reshape(*x.shape[:-1], -1)
    return y, (x8.over(), weights, None if _again(weights) else weight8.over(), like)


def _backward(float8: str, saved: Any, dy: jax.Array) -> tuple[jax.Array, tuple[Weight, ...]]:
    x, weights, weight, like = saved
    if _again(weights):
        # behind the barrier it is another gather than the forward pass's, and none that could begin before its turn
        weights, dy = jax.lax.optimization_barrier((weights, dy))
    if not float8:
        rows = tuple(range(dy.ndim - 1))
        dx, dweight = dy @ _joined(weights, like.dtype), jax.lax.dot_general(dy, x, ((rows, rows), ((), ())))
        return dx, parted(dweight, weights)
    weight, dy8 = weight or joined_numbers(float8, weights, like.dtype).over(), numbers(flat(dy), BACKWARD, float8)
    dx = product(dy8.lying(), weight, like.dtype, exact=True).reshape(*dy.shape[:-1], -1)
    return dx, parted(product(dy8.over(), x, like.dtype, exact=True), weights)


_linear.defvjp(_forward, _backward)


def joined_numbers(form: str, weights: tuple[Weight, ...], dtype: Any, turned: bool = True) -> Numbers:
    """Of a matrix alone the float32 numbers are read; several are joined in `dtype`."""
    if len(weights) == 1:
        return numbers(whole(weights[0]), FORWARD, form, dtype, turned)
    return numbers(_joined(weights, dtype), FORWARD, form, turned=turned)


def numbers(x: jax.Array, to: Any, form: str, like: Any = None, turned: bool = True) -> Numbers:
    """x [N, D] in a float8 format. like: a dtype to which x is rounded first; turned: whether both ways."""
    if form == "pallas":
        from smedjan_jax.kernels import float8 as kernels

        return kernels.numbers(kernels.MATRIX, (x,), to, like or x.dtype, turned)
    number, scale = quantised(x.astype(like or x.dtype), to)
    return Numbers(number, number.T if turned else None, scale)


def flat(x: jax.Array) -> jax.Array:
    """A matrix of all rows, as XLA wants the operands of a float8 matmul."""
    return x.reshape(-1, x.shape[-1])


def _again(weights: tuple[Weight, ...]) -> bool:
    return any(isinstance(weight, Shard) and weight.again for weight in weights)


def _joined(weights: tuple[Weight, ...], dtype: Any) -> jax.Array:
    found = [whole(weight) for weight in weights]
    return (found[0] if len(found) == 1 else jnp.concatenate(found)).astype(dtype)


def parted(grad: jax.Array, weights: tuple[Weight, ...]) -> tuple[Weight, ...]:
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
