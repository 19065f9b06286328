"""Quantised weights in JAX (smedjan_common.model.quantization): made whole where they are multiplied, one at a time inside the step."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from smedjan_common.model.quantization import GROUP, bits_of, names


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """A weight [..., out, in] as codes, scales and biases."""

    codes: jax.Array
    scales: jax.Array
    biases: jax.Array

    @property
    def bits(self) -> int:
        return bits_of(self.codes.shape, self.scales.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.scales.shape[:-1], self.scales.shape[-1] * GROUP)

    def __getitem__(self, index: Any) -> "Quantized":
        """Of the first dimension, as of an array."""
        return Quantized(self.codes[index], self.scales[index], self.biases[index])

    def astype(self, dtype: Any) -> jax.Array:
        """The weight itself."""
        shifts = jnp.arange(0, 32, self.bits, dtype=jnp.uint32)
        codes = (self.codes[..., None] >> shifts) & jnp.uint32(2**self.bits - 1)
        groups = codes.reshape(*self.scales.shape, GROUP).astype(jnp.float32)
        scales, biases = (each.astype(jnp.float32)[..., None] for each in (self.scales, self.biases))
        return (groups * scales + biases).reshape(self.shape).astype(dtype)


def weight_of(params: dict[str, Any], name: str) -> Any:
    """The weight `name` of params: an array, a part of one, or a Quantized."""
    codes, scales, biases = names(name)
    return Quantized(params[codes], params[scales], params[biases]) if scales in params else params[name]
