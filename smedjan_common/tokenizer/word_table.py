"""Words to slots for whole arrays of words: a hash table in NumPy, with a dictionary for the few words it has no room for.

A word of up to 15 bytes is one key of two 64-bit numbers: its bytes, zeros after them, its length in the last byte. Open addressing
with linear probing over a table that is at most a quarter full; each round looks up all words that are not settled yet. Slots count
up in the order in which new words are met, so that what belongs to a word lives in plain arrays indexed by slot.
"""

import sys

import numpy as np

KEY_BYTES = 15
_FIRST_BITS = 14
_MASKS = np.array([(1 << 8 * n) - 1 for n in range(8)] + [(1 << 64) - 1], np.uint64)
_A, _B = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)
_PAD = bytes(16)


class WordTable:
    """`slots(data, starts, keep)` -> (slots int32 [words], fresh). `count`: slots so far."""

    def __init__(self):
        assert sys.byteorder == "little"
        self.count = 0
        self._keys = np.zeros((1 << _FIRST_BITS, 2), np.uint64)  # (0, 0) is no key: the length of a word is not 0
        self._values = np.zeros(1 << _FIRST_BITS, np.int32)
        self._short = 0
        self._long: dict[bytes, int] = {}

    def slots(self, data: bytes, starts: np.ndarray, keep: int) -> tuple[np.ndarray, np.ndarray]:
        """Slots int32 of the words of `data` that begin at `starts`; the numbers int64 of those words that got a new slot, in slot order.

        Words longer than `keep` bytes get a new slot every time and are not remembered.
        """
        lengths = np.diff(starts, append=len(data))
        padded = data + _PAD
        is_short = lengths <= KEY_BYTES
        short = slice(None) if is_short.all() else np.flatnonzero(is_short)
        slots = np.empty(len(starts), np.int32)
        slots[short], fresh = self._short_slots(padded, starts[short], lengths[short])
        if isinstance(short, slice):
            return slots, fresh
        fresh_long = []
        for number in np.flatnonzero(~is_short).tolist():
            begin, size = int(starts[number]), int(lengths[number])
            word = data[begin : begin + size]
            slot = self._long.get(word)
            if slot is None:
                slot = self.count
                self.count += 1
                fresh_long.append(number)
                if size <= keep:
                    self._long[word] = slot
            slots[number] = slot
        return slots, np.concatenate([short[fresh], np.array(fresh_long, np.int64)])

    def _short_slots(self, padded: bytes, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        eights = np.ndarray((len(padded) - 7,), "<u8", padded, strides=(1,))
        keys = np.empty((len(starts), 2), np.uint64)
        keys[:, 0] = eights.take(starts) & _MASKS.take(np.minimum(lengths, 8))
        keys[:, 1] = eights.take(starts + 8) & _MASKS.take(np.maximum(lengths - 8, 0)) | lengths.astype(np.uint64) << np.uint64(56)
        places, unknown = self._find(keys)
        slots = self._values.take(places)
        if not len(unknown):
            return slots, unknown
        first, which = _distinct(keys[unknown])
        fresh = unknown[first]
        slots[unknown] = (self.count + which).astype(np.int32)
        self._insert(keys[fresh], self.count + np.arange(len(fresh), dtype=np.int32))
        self.count += len(fresh)
        return slots, fresh

    def _find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(place of each key [n], numbers of the keys that are not in the table)."""
        mask = len(self._values) - 1
        places = self._hash(keys)
        here = self._keys.take(places, axis=0)
        other = np.flatnonzero((here[:, 0] != keys[:, 0]) | (here[:, 1] != keys[:, 1]))
        unknown = []
        while len(other):
            empty = self._keys[places[other], 1] == 0
            unknown.append(other[empty])
            other = other[~empty]
            places[other] = (places[other] + 1) & mask
            here = self._keys[places[other]]
            other = other[(here != keys[other]).any(axis=1)]
        return places, np.sort(np.concatenate(unknown)) if unknown else other

    def _insert(self, keys: np.ndarray, values: np.ndarray) -> None:
        """Add keys that are not in the table, all different."""
        self._short += len(keys)
        if self._short * 4 > len(self._values):
            used = np.flatnonzero(self._keys[:, 1])
            keys = np.concatenate([self._keys[used], keys])
            values = np.concatenate([self._values[used], values])
            size = 1 << (self._short * 8).bit_length()
            self._keys, self._values = np.zeros((size, 2), np.uint64), np.zeros(size, np.int32)
        mask = len(self._values) - 1
        places, left = self._hash(keys), np.arange(len(keys))
        while len(left):
            free = left[self._keys[places[left], 1] == 0]
            self._keys[places[free]] = keys[free]  # of several keys for one place the last one wins, the others go on
            won = (self._keys[places[left]] == keys[left]).all(axis=1)
            self._values[places[left[won]]] = values[left[won]]
            left = left[~won]
            places[left] = (places[left] + 1) & mask

    def _hash(self, keys: np.ndarray) -> np.ndarray:
        mixed = keys[:, 0] * _A ^ keys[:, 1] * _B
        mixed ^= mixed >> np.uint64(32)
        mixed *= _A
        return (mixed >> np.uint64(65 - len(self._values).bit_length())).astype(np.int64)


def _distinct(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(number of the first of each distinct key, in order; for each key which of them it is)."""
    order = np.lexsort((keys[:, 0], keys[:, 1]))
    ordered = keys[order]
    opens = np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(axis=1)])
    group = np.cumsum(opens) - 1
    first = order[opens]  # the sort is stable: the first occurrence
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    which = np.empty(len(keys), np.int64)
    which[order] = rank[group]
    return np.sort(first), which
