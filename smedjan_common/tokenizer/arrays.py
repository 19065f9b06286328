"""Small tools for arrays: a column that grows, a gather of stretches, texts in groups."""

from collections.abc import Iterator, Sequence
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


def groups(texts: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    """Texts in groups of up to `size` characters; a longer one makes a group by itself."""
    first, total = 0, 0
    for number, text in enumerate(texts):
        if number > first and total + len(text) > size:
            yield texts[first:number]
            first, total = number, 0
        total += len(text) + 1
    if first < len(texts):
        yield texts[first:]
