"""An array that is on a disk, or is yet to be computed: who goes through a model tensor by tensor never holds all of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Show = Callable[[str, int, int], None]  # progress: stage, bytes done, bytes in total


@dataclass(frozen=True)
class Lazy:
    """An array that is made when it is asked for, by `np.asarray` or `read`, and never kept."""

    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.read()
        return array if dtype is None else array.astype(dtype, copy=False)

    def then(self, function: Callable[[np.ndarray], np.ndarray], dtype: Any = None, shape: tuple[int, ...] | None = None) -> "Lazy":
        """The array that `function` makes of this one; `dtype` and `shape` say what it will be where they change."""
        return Lazy(np.dtype(dtype or self.dtype), self.shape if shape is None else shape, lambda: function(self.read()))


def watched(tensors: Mapping[str, Lazy], stage: str, show: Show) -> dict[str, Lazy]:
    """The same tensors; each one that is read moves the bar of `stage` on."""
    total, done = sum(tensor.nbytes for tensor in tensors.values()), 0

    def watch(tensor: Lazy) -> Lazy:
        def count(array: np.ndarray) -> np.ndarray:
            nonlocal done
            done += tensor.nbytes
            show(stage, done, total)
            return array

        return tensor.then(count)

    return {name: watch(tensor) for name, tensor in tensors.items()}
