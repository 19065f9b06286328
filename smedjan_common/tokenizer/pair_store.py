"""Every pair that training has seen: ids, an upper bound of its count, and the positions of its occurrences.

The best pairs are looked for in a pool, the pairs whose bound is at least `floor`; when it runs low the floor is lowered.
"""

import numpy as np

_POOL = 4096
_LOW = 64


class PairStore:
    """Columns `left`, `right`, `bound` over pairs; `top`, `occurrences`, `shrink`, `add`. Pairs below `min_count` are not kept."""

    def __init__(self, min_count: int):
        self.min_count, self.size, self.used = min_count, 0, 0
        self.left, self.right = np.empty(0, np.int32), np.empty(0, np.int32)
        self.bound, self.start, self.length = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64)
        self._where = np.empty(0, np.int32)
        self._pool, self._floor = np.empty(0, np.int64), np.int64(1 << 62)

    def add(self, left: np.ndarray, right: np.ndarray, counts: np.ndarray, first: np.ndarray, where: np.ndarray) -> None:
        """New pairs: ids, exact counts, and `where` [n] all positions, those of pair i from first[i] to first[i + 1]."""
        lengths = np.diff(np.append(first, len(where)))
        kept = counts >= self.min_count
        if not kept.all():
            where = where[np.repeat(kept, lengths)]
            left, right, counts, lengths = left[kept], right[kept], counts[kept], lengths[kept]
        old, new = self.size, self.size + len(left)
        starts = self.used + np.cumsum(lengths) - lengths
        for name, values in (("left", left), ("right", right), ("bound", counts), ("start", starts), ("length", lengths)):
            column = _room(getattr(self, name), new)
            column[old:new] = values
            setattr(self, name, column)
        self._where = _room(self._where, self.used + len(where))
        self._where[self.used : self.used + len(where)] = where
        self.size, self.used = new, self.used + len(where)
        pooled = np.flatnonzero(counts >= self._floor) + old
        if len(pooled):
            self._pool = np.concatenate([self._pool, pooled])

    def top(self, count: int) -> tuple[np.ndarray, tuple[int, int, int]]:
        """The best `count` pairs by bound, then ids, and the (count, left, right) that none of the others is ahead of."""
        self._pool = self._pool[self.bound[self._pool] >= self._floor]
        if len(self._pool) < _LOW and self._floor > self.min_count:
            self._refill()
        pool, bounds = self._pool, self.bound[self._pool]
        least = int(self._floor)
        if len(pool) > count:
            least = int(np.partition(bounds, len(pool) - count)[len(pool) - count])
            pool = pool[bounds >= least]
        pool = pool[np.lexsort((self.right[pool], self.left[pool], -self.bound[pool]))]
        if len(pool) > count:
            next_one = pool[count]
            return pool[:count], (int(self.bound[next_one]), int(self.left[next_one]), int(self.right[next_one]))
        return pool, (least - 1, -1, -1)

    def _refill(self) -> None:
        bounds = self.bound[: self.size]
        floor = self.min_count
        if len(bounds) > _POOL:
            floor = max(floor, int(np.partition(bounds, len(bounds) - _POOL)[len(bounds) - _POOL]))
        self._floor = np.int64(floor)
        self._pool = np.flatnonzero(bounds >= floor)

    def occurrences(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(number in `chosen` [n], position int32 [n]) of all their stored occurrences."""
        lengths = self.length[chosen]
        group = np.repeat(np.arange(len(chosen)), lengths)
        offsets = self.start[chosen] - (np.cumsum(lengths) - lengths)
        return group, self._where[np.arange(len(group)) + offsets[group]]

    def shrink(self, chosen: np.ndarray, group: np.ndarray, where: np.ndarray) -> None:
        """Keep only these occurrences, given as `occurrences` gives them."""
        lengths = np.bincount(group, minlength=len(chosen))
        offsets = self.start[chosen] - (np.cumsum(lengths) - lengths)
        self._where[np.arange(len(group)) + offsets[group]] = where
        self.length[chosen] = lengths


def _room(column: np.ndarray, size: int) -> np.ndarray:
    """The column itself, or a copy with room to grow."""
    if size <= len(column):
        return column
    grown = np.empty(max(size, len(column) * 3 // 2, 1024), column.dtype)
    grown[: len(column)] = column
    return grown
