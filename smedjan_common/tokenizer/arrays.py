"""Two small array tools: a column that grows, and a gather of stretches."""

from typing import Any

import numpy as np


class Column:
    """A NumPy array that grows at its end. `values`: what it holds, a view that the next `extend` may leave behind."""

    def __init__(self, dtype: Any):
        self._room, self.size = np.empty(1024, dtype), 0

    @property
    def values(self) -> np.ndarray:
        return self._room[: self.size]

    def extend(self, values: np.ndarray) -> None:
        """Append; amortised constant time per value."""
        size = self.size + len(values)
        if size > len(self._room):
            room = np.empty(max(size, len(self._room) * 3 // 2), self._room.dtype)
            room[: self.size] = self.values
            self._room = room
        self._room[self.size : size] = values
        self.size = size


def gather(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """values[starts[i] : starts[i] + lengths[i]] for all i, one after another."""
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    if total == len(lengths) and (lengths == 1).all():
        return values.take(starts)
    return values.take(np.repeat(starts - (ends - lengths), lengths) + np.arange(total))
