"""float32 that is float32: a GPU (CUDA, Apple's M5) multiplies float32 matrices in TF32 unless it is told not to, and loses three digits.

Products of bfloat16 operands are not concerned: they are as fast as before, and sum in float32.
"""

import os

import mlx.core as mx

SETTING = "MLX_ENABLE_TF32"


def exact_float32() -> None:
    """Have float32 matrices multiplied in float32, unless the user's environment says otherwise. MLX looks once, at its first product
    of matrices: nothing may be multiplied before."""
    os.environ.setdefault(SETTING, "0")


def on_gpu() -> bool:
    """Whether MLX computes on a GPU (Metal or CUDA)."""
    return mx.default_device().type == mx.DeviceType.gpu
