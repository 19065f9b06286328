"""Quantised weights in NumPy: rounded, made whole again, packed into words. What they are: quantization.py."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from smedjan_common.errors import CheckpointError
from smedjan_common.model.quantization import GROUP, bits_of


class Quantized(NamedTuple):
    """A weight: codes uint32, scales and biases float16."""

    codes: np.ndarray
    scales: np.ndarray
    biases: np.ndarray

    @property
    def bits(self) -> int:
        return bits_of(self.codes.shape, self.scales.shape)


def quantize(weight: np.ndarray, bits: int) -> Quantized:
    """float32 [..., in] rounded. Raises CheckpointError where float16 cannot hold a scale or a bias."""
    groups = np.asarray(weight, np.float32).reshape(*weight.shape[:-1], -1, GROUP)
    codes, scales, biases = ROUNDING[bits](groups)
    if not (np.isfinite(scales).all() and np.isfinite(biases).all()):
        largest = float(np.abs(groups).max())
        why = f"Its largest is {largest:g}, and a group's scale is a float16."
        raise CheckpointError("The weights are too large to quantise.", why, "Keep the model as it is.")
    return Quantized(pack(codes.reshape(weight.shape), bits), scales, biases)


def dequantize(weight: Quantized) -> np.ndarray:
    """float32 [..., in]: scale * code + bias, rounded once or twice as float32 does."""
    codes = unpack(weight.codes, weight.bits)
    groups = codes.reshape(*weight.scales.shape, GROUP).astype(np.float32)
    wide = weight.scales.astype(np.float32)[..., None], weight.biases.astype(np.float32)[..., None]
    return (groups * wide[0] + wide[1]).reshape(codes.shape)


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes [..., in] as uint32 words [..., in * bits / 32], the first in the lowest bits."""
    per = 8 // bits
    parts = codes.reshape(*codes.shape[:-1], -1, per)
    bytes_ = np.bitwise_or.reduce(parts << (bits * np.arange(per, dtype=np.uint8)), axis=-1).astype(np.uint8)
    return np.ascontiguousarray(bytes_).view("<u4").astype(np.uint32, copy=False)


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """The way back: uint8 codes."""
    bytes_ = np.ascontiguousarray(words.astype("<u4", copy=False)).view(np.uint8)
    parts = (bytes_[..., None] >> (bits * np.arange(8 // bits, dtype=np.uint8))) & (2**bits - 1)
    return parts.reshape(*words.shape[:-1], -1).astype(np.uint8)


def _symmetric(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As llama.cpp's Q8_0: codes are rounded by the float32 scale, which is kept in float16."""
    scale = np.abs(groups).max(axis=-1, keepdims=True) / np.float32(127)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
        kept = scale[..., 0].astype(np.float16)
        codes = _away_from_zero(groups * inverse) + 128
        return codes.astype(np.uint8), kept, (kept * np.float16(-128)).astype(np.float16)


def _least_to_largest(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As llama.cpp's Q4_1."""
    least, largest = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
    scale = (largest - least) / np.float32(15)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
        codes = np.trunc((groups - least) * inverse + np.float32(0.5)).clip(0, 15)
        return codes.astype(np.uint8), scale[..., 0].astype(np.float16), least[..., 0].astype(np.float16)


def _away_from_zero(x: np.ndarray) -> np.ndarray:
    """To the nearest whole number, halves away from zero, as C rounds."""
    whole = np.floor(np.abs(x))
    return np.sign(x) * (whole + np.floor(2 * (np.abs(x) - whole)))


ROUNDING: dict[int, Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]] = {8: _symmetric, 4: _least_to_largest}
