"""Text to token ids at speed: split into words, look each word up, encode the words never seen before together.

A cache maps a word to a slot; `starts` and `lengths` of the slots point into one flat array of ids, so a whole text is one NumPy
gather. Words longer than 64 bytes are not kept, and the cache is emptied when it passes its size.
"""

import numpy as np

from smedjan_common.tokenizer.bpe import LONGEST_SHORT_WORD, Merges
from smedjan_common.tokenizer.patterns import Splitter

CACHE_WORDS = 1 << 19
_CACHE_IDS = 1 << 22


class Encoder:
    """`encode(text) -> int32 [n]`: the ids of ordinary text; special tokens are text like any other."""

    def __init__(self, merges: Merges, splitter: Splitter, cache_words: int = CACHE_WORDS):
        self.merges, self.splitter, self.cache_words = merges, splitter, cache_words
        self._clear()

    def encode(self, text: str) -> np.ndarray:
        parts = [self._block(block) for block in self.splitter.blocks(text)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0, np.int32)

    def _clear(self) -> None:
        self._slots = _Slots()
        self._starts, self._lengths, self._ids = np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.int32)

    def _block(self, text: str) -> np.ndarray:
        if self._slots.count > self.cache_words or len(self._ids) > _CACHE_IDS:
            self._clear()
        if not text.isascii():
            text.encode()  # raises before anything is changed
        words = self.splitter.words(text)
        slots = np.fromiter(map(self._slots.__getitem__, words), np.int32, len(words))
        if self._slots.fresh:
            ids, lengths = self.merges.encode_words([word.encode() for word in self._slots.fresh])
            self._starts = np.concatenate([self._starts, len(self._ids) + np.cumsum(lengths, dtype=np.int64) - lengths])
            self._lengths = np.concatenate([self._lengths, lengths])
            self._ids = np.concatenate([self._ids, ids])
            self._slots.fresh = []
        return gather(self._ids, self._starts[slots], self._lengths[slots])


class _Slots(dict):
    """word -> slot; an unknown word gets the next slot and waits in `fresh` to be encoded."""

    def __init__(self):
        super().__init__()
        self.count, self.fresh = 0, []

    def __missing__(self, word: str) -> int:
        slot = self.count
        if len(word) <= LONGEST_SHORT_WORD:
            self[word] = slot
        self.fresh.append(word)
        self.count += 1
        return slot


def gather(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """values[starts[i] : starts[i] + lengths[i]] for all i, one after another."""
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    if total == len(lengths):
        return values[starts]
    return values[np.repeat(starts - (ends - lengths), lengths) + np.arange(total)]
