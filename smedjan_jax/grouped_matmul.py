"""Grouped matmul in JAX: rows that belong to E groups, each group with a weight of its own.

    y_r = W_e x_r        for every row r of group e

Implementations compute the same; tests hold them against "plain", and bench/experts.py times them. Their gradients are written
out where JAX's own would scatter-add the weights' gradients, in no fixed order on a GPU.

Shapes: R rows, E groups (experts), D in, F out, B blocks of C rows.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def grouped_matmul(x_RD: jax.Array, weight_EFD: jax.Array, sizes_E: jax.Array, block: int, implementation: str = "auto") -> jax.Array:
    """x W_e^T of the rows of each expert e, [R, F] in the dtype of x, accumulated in float32.

    The rows of expert 0 come first, then those of 1, …; sizes_E are whole multiples of `block`, and rows past their sum are zero.
    """
    name = preferred_implementation() if implementation == "auto" else implementation
    return IMPLEMENTATIONS[name](x_RD, weight_EFD, sizes_E, block)


def preferred_implementation() -> str:
    """What "auto" takes."""
    return "blocks"


def _plain(x_RD: jax.Array, weight_EFD: jax.Array, sizes_E: jax.Array, block: int) -> jax.Array:
    """Every expert meets every row, all but one in vain: the twin that the others are tested against."""
    expert_R = _experts_of(jnp.arange(x_RD.shape[0]), sizes_E)
    every_ERF = jnp.einsum("rd,efd->erf", x_RD, weight_EFD.astype(x_RD.dtype), preferred_element_type=jnp.float32)
    mine_ER = expert_R == jnp.arange(weight_EFD.shape[0])[:, None]
    return jnp.sum(jnp.where(mine_ER[..., None], every_ERF, 0.0), axis=0).astype(x_RD.dtype)


def _ragged(x_RD: jax.Array, weight_EFD: jax.Array, sizes_E: jax.Array, block: int) -> jax.Array:
    """XLA's own operation. On CPUs, and on NVIDIA GPUs so far, XLA makes a matmul of every row with every expert of it."""
    weight_EDF = weight_EFD.astype(x_RD.dtype).swapaxes(1, 2)
    return jax.lax.ragged_dot(x_RD, weight_EDF, sizes_E.astype(jnp.int32), preferred_element_type=jnp.float32).astype(x_RD.dtype)


@jax.custom_vjp
def _blocks(x_BCD: jax.Array, weight_EFD: jax.Array, expert_B: jax.Array) -> jax.Array:
    """One batched matmul of all blocks; each brings its own copy of its expert's weights."""
    return jnp.einsum("bcd,bfd->bcf", x_BCD, weight_EFD.astype(x_BCD.dtype)[expert_B])


def _blocks_backward(saved, dy_BCF: jax.Array):
    x_BCD, weight_EFD, expert_B = saved
    dx_BCD = jnp.einsum("bcf,bfd->bcd", dy_BCF, weight_EFD.astype(dy_BCF.dtype)[expert_B])
    dweight_BFD = jnp.einsum("bcf,bcd->bfd", dy_BCF, x_BCD, preferred_element_type=jnp.float32)
    hit_EB = (expert_B == jnp.arange(weight_EFD.shape[0])[:, None]).astype(jnp.float32)
    dweight_EFD = jnp.einsum("eb,bfd->efd", hit_EB, dweight_BFD, precision=jax.lax.Precision.HIGHEST)
    return dx_BCD, dweight_EFD.astype(weight_EFD.dtype), None


@jax.custom_vjp
def _loop(x_BCD: jax.Array, weight_EFD: jax.Array, expert_B: jax.Array) -> jax.Array:
    """Block after block, each with the weights where they are: no copies, and small matmuls."""
    weight = weight_EFD.astype(x_BCD.dtype)
    return jax.lax.map(lambda at: at[0] @ weight[at[1]].T, (x_BCD, expert_B))


def _loop_backward(saved, dy_BCF: jax.Array):
    x_BCD, weight_EFD, expert_B = saved
    weight = weight_EFD.astype(dy_BCF.dtype)

    def add(dweight_EFD, at):
        x_CD, dy_CF, expert = at
        own = jnp.matmul(dy_CF.T, x_CD, preferred_element_type=jnp.float32)
        return dweight_EFD.at[expert].add(own), dy_CF @ weight[expert]

    dweight_EFD, dx_BCD = jax.lax.scan(add, jnp.zeros(weight_EFD.shape, jnp.float32), (x_BCD, dy_BCF, expert_B))
    return dx_BCD, dweight_EFD.astype(weight_EFD.dtype), None


_blocks.defvjp(lambda *args: (_blocks(*args), args), _blocks_backward)
_loop.defvjp(lambda *args: (_loop(*args), args), _loop_backward)


def _in_blocks(multiply: Callable) -> Callable:
    def grouped(x_RD: jax.Array, weight_EFD: jax.Array, sizes_E: jax.Array, block: int) -> jax.Array:
        blocks = x_RD.shape[0] // block
        expert_B = _experts_of(jnp.arange(blocks) * block, sizes_E)
        return multiply(x_RD.reshape(blocks, block, -1), weight_EFD, expert_B).reshape(x_RD.shape[0], -1)

    return grouped


def _experts_of(rows: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """The expert of each row; the last one for rows past the end."""
    return jnp.minimum(jnp.sum(rows[:, None] >= jnp.cumsum(sizes_E), axis=1), sizes_E.size - 1)


IMPLEMENTATIONS: dict[str, Callable] = {
    "plain": _plain,
    "ragged": _ragged,
    "blocks": _in_blocks(_blocks),
    "loop": _in_blocks(_loop),
}
UNBLOCKED = ("plain", "ragged")
