"""Quantised weights in MLX (smedjan_common.model.quantization): multiplied as they are, by MLX's own kernel.

Scales and biases are float16, which bfloat16 would round: products are made in float32 and returned in the dtype of x.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from smedjan_common.model.quantization import GROUP, bits_of, names
from smedjan_mlx.precision import on_gpu

MOST_ROWS = 4  # of x on a CPU: beyond, the weight is made whole (scoring took 12 s and not 52); where best to change was not measured


@dataclass(frozen=True)
class Quantized:
    """A weight [..., out, in] as codes, scales and biases."""

    codes: mx.array
    scales: mx.array
    biases: mx.array

    @property
    def bits(self) -> int:
        return bits_of(self.codes.shape, self.scales.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.scales.shape[:-1], self.scales.shape[-1] * GROUP)

    def __getitem__(self, index: Any) -> "Quantized":
        """Of the first dimension, as of an array."""
        return Quantized(self.codes[index], self.scales[index], self.biases[index])

    def astype(self, dtype: Any) -> mx.array:
        """The weight itself."""
        scales, biases = self.scales.astype(mx.float32), self.biases.astype(mx.float32)
        return mx.dequantize(self.codes, scales, biases, GROUP, self.bits).astype(dtype)

    def times(self, x: mx.array) -> mx.array:
        """x W^T, in the dtype of x."""
        if x.size > MOST_ROWS * x.shape[-1] and not on_gpu():
            return x @ self.astype(x.dtype).T
        wide = x.astype(mx.float32)
        return mx.quantized_matmul(wide, self.codes, self.scales, self.biases, True, GROUP, self.bits).astype(x.dtype)


def weight_of(params: dict[str, Any], name: str) -> Any:
    """The weight `name` of params: an array, a part of one, or a Quantized."""
    codes, scales, biases = names(name)
    return Quantized(params[codes], params[scales], params[biases]) if scales in params else params[name]


def product(x: mx.array, weight: Any) -> mx.array:
    """x W^T, in the dtype of x."""
    return weight.times(x) if isinstance(weight, Quantized) else x @ weight.astype(x.dtype).T
