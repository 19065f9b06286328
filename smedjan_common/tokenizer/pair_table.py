"""A fixed hash table from symbol pairs to merge ranks, looked up for whole arrays at once: two probes, whatever the pair.

First level: one slot per hash; pairs that lose their slot to an earlier one go to a second, roomier table without collisions.
"""

from collections.abc import Sequence

import numpy as np

NONE = (1 << 31) - 1  # the rank of a pair that is no merge

_MULTIPLIERS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F], np.uint64)


class PairTable:
    """`ranks(left, right)`: int32 arrays of symbols of one shape -> int32 ranks, NONE where the pair is not a merge."""

    def __init__(self, pairs: Sequence[tuple[int, int]]):
        both = np.array(pairs, np.uint64).reshape(-1, 2)
        keys, first = np.unique(both[:, 0] << np.uint64(32) | both[:, 1], return_index=True)  # the lowest rank wins
        order = np.argsort(first)
        keys, ranks = keys[order], first[order].astype(np.int32)
        bits = max(10, int(len(keys) * 8).bit_length())
        self._one = _Level(_MULTIPLIERS[0], bits)
        left = self._one.fill(keys, ranks)
        bits = max(4, int(len(left) * 2).bit_length())
        while True:  # ends: with 2^bits >> n^2 a multiply-shift hash has no collision
            self._two = _Level(_MULTIPLIERS[1 + bits % 3], bits)
            if not len(self._two.fill(keys[left], ranks[left])):
                break
            bits += 1

    def ranks(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Ranks of the pairs, int32 of the same shape."""
        keys = left.astype(np.uint64) << np.uint64(32) | right.astype(np.uint64)
        return np.minimum(self._one.get(keys), self._two.get(keys))


class _Level:
    def __init__(self, multiplier: np.uint64, bits: int):
        self.multiplier, self.shift = multiplier, np.uint64(64 - bits)
        self.keys = np.full(1 << bits, np.uint64(0xFFFFFFFFFFFFFFFF), np.uint64)
        self.values = np.full(1 << bits, NONE, np.int32)

    def _slots(self, keys: np.ndarray) -> np.ndarray:
        return ((keys ^ keys >> np.uint64(29)) * self.multiplier >> self.shift).astype(np.int64)

    def fill(self, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Store what finds its slot free; return the numbers of the others."""
        slots = self._slots(keys)
        taken, first = np.unique(slots, return_index=True)
        self.keys[taken], self.values[taken] = keys[first], values[first]
        rest = np.ones(len(keys), bool)
        rest[first] = False
        return np.flatnonzero(rest)

    def get(self, keys: np.ndarray) -> np.ndarray:
        slots = self._slots(keys)
        return np.where(self.keys[slots] == keys, self.values[slots], np.int32(NONE))
