"""Grouped matmul in MLX: rows that belong to E groups, each group with a weight of its own.

    y_r = W_e x_r        for every row r of group e

Implementations compute the same; tests hold them against "plain". The gradient of the weights is one segmented matmul, which
MLX takes for sorted rows only; MLX differentiates neither that nor gather_mm of blocks so, hence it is written out.

Shapes: R rows, E groups (experts), D in, F out, B blocks of C rows.
"""

from collections.abc import Callable
from typing import cast

import mlx.core as mx


def grouped_matmul(x_RD: mx.array, weight_EFD: mx.array, sizes_E: mx.array, block: int, implementation: str = "auto") -> mx.array:
    """x W_e^T of the rows of each expert e, [R, F] in the dtype of x, accumulated in float32.

    The rows of expert 0 come first, then those of 1, …; sizes_E are whole multiples of `block`, and rows past their sum are zero.
    """
    name = preferred_implementation() if implementation == "auto" else implementation
    return IMPLEMENTATIONS[name](x_RD, weight_EFD, sizes_E, block)


def preferred_implementation() -> str:
    """What "auto" takes: MLX has kernels for sorted rows on GPUs; on a CPU it would multiply row by row."""
    return "gather" if mx.default_device().type == mx.DeviceType.gpu else "blocks"


def _plain(x_RD: mx.array, weight_EFD: mx.array, sizes_E: mx.array, block: int) -> mx.array:
    """Every expert meets every row, all but one in vain: the twin that the others are tested against."""
    expert_R = _experts_of(mx.arange(x_RD.shape[0]), sizes_E)
    every_ERF = (x_RD @ weight_EFD.astype(x_RD.dtype).swapaxes(1, 2)).astype(mx.float32)
    mine_ER = expert_R == mx.arange(weight_EFD.shape[0])[:, None]
    return mx.sum(mx.where(mine_ER[..., None], every_ERF, 0.0), axis=0).astype(x_RD.dtype)


@mx.custom_function
def _blocks(x_BCD: mx.array, weight_EFD: mx.array, sizes_E: mx.array) -> mx.array:
    """Every block by the weights of its expert, which stay where they are."""
    return _gathered(x_BCD, weight_EFD.swapaxes(1, 2), sizes_E)


@_blocks.vjp
def _blocks_backward(primals, dy_BCF, y_BCF):
    x_BCD, weight_EFD, sizes_E = primals
    ends_E = mx.cumsum(sizes_E)
    segments_E2 = mx.stack([ends_E - sizes_E, ends_E], axis=-1).astype(mx.uint32)
    dy_RF, x_RD = (array.reshape(-1, array.shape[-1]) for array in (dy_BCF, x_BCD))
    dweight_EFD = mx.segmented_mm(dy_RF.T, x_RD, segments_E2).astype(weight_EFD.dtype)
    return _gathered(dy_BCF, weight_EFD, sizes_E), dweight_EFD, mx.zeros_like(sizes_E)


def _gathered(x_BCI: mx.array, weight_EIO: mx.array, sizes_E: mx.array) -> mx.array:
    B, C, _ = x_BCI.shape
    expert_B = _experts_of(mx.arange(B) * C, sizes_E)
    return mx.gather_mm(x_BCI, weight_EIO.astype(x_BCI.dtype), rhs_indices=expert_B, sorted_indices=True)


def _in_blocks(x_RD: mx.array, weight_EFD: mx.array, sizes_E: mx.array, block: int) -> mx.array:
    y_BCF = cast(mx.array, _blocks(x_RD.reshape(-1, block, x_RD.shape[1]), weight_EFD, sizes_E))
    return y_BCF.reshape(x_RD.shape[0], -1)


def _experts_of(rows: mx.array, sizes_E: mx.array) -> mx.array:
    """The expert of each row; the last one for rows past the end."""
    return mx.minimum(mx.sum(rows[:, None] >= mx.cumsum(sizes_E), axis=1), sizes_E.size - 1)


IMPLEMENTATIONS: dict[str, Callable] = {"plain": _plain, "gather": _in_blocks, "blocks": _in_blocks}
UNBLOCKED = ("plain", "gather")
