"""What readers give and writers take: a model whose tensors are still on disk.

Tensors have the names, shapes and layout of smedjan_common.model.params: weights [out, in], the embedding [padded V, D] being the head too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from smedjan_common.checkpoint import CheckpointInfo
from smedjan_common.checkpoint.lazy import Lazy
from smedjan_common.config import ModelConfig
from smedjan_common.errors import CheckpointError
from smedjan_common.model.quantization import bits_of
from smedjan_common.model.rounding import Quantized, dequantize
from smedjan_common.tokenizer import Tokenizer


class Packed(NamedTuple):
    """A quantised weight, still on disk: codes, scales, biases."""

    codes: Lazy
    scales: Lazy
    biases: Lazy

    @property
    def bits(self) -> int:
        return bits_of(self.codes.shape, self.scales.shape)

    def read(self) -> Quantized:
        return Quantized(*(part.read() for part in self))

    def whole(self, shape: tuple[int, ...]) -> Lazy:
        """The weight as float32."""
        return Lazy(np.dtype(np.float32), shape, lambda: dequantize(self.read()))


@dataclass(frozen=True)
class Portable:
    """A model on its way from one format to another.

    step: optimizer steps done, 0 where that is not known. source: what the file it came from tells of itself (JSON values).
    notes: one sentence each, for the user: what is not the same on the other side.
    slots: optimizer arrays by `{slot}.{parameter}`, and info: what checkpoint.json said, where it was a step checkpoint of smedjan.
    packed: the weights that are quantised in the source, as they are there; `tensors` has them too, as float32.
    """

    config: ModelConfig
    tensors: Mapping[str, Lazy]
    tokenizer: Tokenizer | None
    step: int = 0
    source: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    slots: Mapping[str, Lazy] = field(default_factory=dict)
    info: CheckpointInfo | None = None
    packed: Mapping[str, Packed] = field(default_factory=dict)


def cast(name: str, tensor: Lazy, dtype: np.dtype) -> Lazy:
    """`tensor` in another floating dtype, rounded to nearest even. Reading raises CheckpointError where a finite value becomes infinite."""

    def convert(array: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            out = array.astype(dtype)
        if dtype.itemsize < array.dtype.itemsize or dtype == np.float16:
            _check_range(name, array, out)
        return out

    return tensor if tensor.dtype == dtype else tensor.then(convert, dtype)


def _check_range(name: str, array: np.ndarray, out: np.ndarray) -> None:
    lost = np.isinf(out) & np.isfinite(array)
    if lost.any():
        value = float(array[lost].flat[0])
        raise CheckpointError(
            f"{name} has the value {value:g}, which {out.dtype.name} cannot hold.", "It would become infinite.", "Take --dtype bfloat16."
        )


def check_equal(where: str, found: Mapping[str, Lazy], expected: Mapping[str, Lazy]) -> None:
    """Raises CheckpointError naming the first tensor whose name, dtype, shape or any bit differs."""
    if odd := set(found).symmetric_difference(expected):
        raise _not_what_was_written(where, f"the tensor {min(odd)!r} is missing or too many")
    for name, tensor in expected.items():
        other = found[name]
        if (other.dtype, other.shape) != (tensor.dtype, tensor.shape):
            raise _not_what_was_written(where, f"{name} is {other.dtype} {other.shape}, not {tensor.dtype} {tensor.shape}")
        if not np.array_equal(_bits(other.read()), _bits(tensor.read())):
            raise _not_what_was_written(where, f"{name} has other values")


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _not_what_was_written(where: str, why: str) -> CheckpointError:
    return CheckpointError(f"{where} is not what was written.", f"When read back, {why}.", "Check the disk and try again.")
