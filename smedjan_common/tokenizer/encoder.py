"""Text to token ids at speed: split into words, look each word up, encode together the words never seen before, gather all ids.

Two ways with the same answer (tests hold them together). Long text of a pattern with array rules (fast_split.py) stays in arrays
from its bytes to its ids, 256 KiB at a time; short text, and text of one's own pattern, is split by the regular expression and looked
up in a dictionary. Words longer than 64 bytes are not kept, and a cache is emptied when it passes its size.
"""

from collections.abc import Sequence

import numpy as np

from smedjan_common.tokenizer.arrays import Column, gather, groups
from smedjan_common.tokenizer.bpe import LONGEST_SHORT_WORD, Merges
from smedjan_common.tokenizer.fast_split import RULES, joined_word_starts, word_starts
from smedjan_common.tokenizer.patterns import Splitter
from smedjan_common.tokenizer.word_table import WordTable

CACHE_WORDS = 1 << 19
_BLOCK = 1 << 18  # characters; what is computed for a block stays in the processor's cache
_SHORT_TEXT = 2048  # characters; below this the array way's fixed cost does not pay


class Encoder:
    """`encode(text) -> int32 [n]`: the ids of ordinary text; special tokens are text like any other."""

    def __init__(self, merges: Merges, splitter: Splitter, cache_words: int = CACHE_WORDS, short_text: int = _SHORT_TEXT):
        self._splitter, self._short_text = splitter, short_text
        self._dictionary = _DictionaryCache(merges, splitter, cache_words)
        rules = RULES.get(splitter.expression)
        self._arrays = _ArrayCache(merges, rules, cache_words) if rules else None

    def encode(self, text: str) -> np.ndarray:
        """Raises UnicodeEncodeError at lone surrogates, before anything is remembered."""
        way = self._dictionary if self._arrays is None or len(text) < self._short_text else self._arrays
        parts = [way.encode(block) for block in self._splitter.blocks(text, _BLOCK)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0, np.int32)

    def encode_many(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of many texts one after another, int32 [total], and how many each has, int64 [texts]."""
        ids, counts = [np.empty(0, np.int32)], [np.empty(0, np.int64)]
        for group in groups(texts, _BLOCK):
            if self._arrays is None or len(group) == 1:
                parts = [self.encode(text) for text in group]
                ids += parts
                counts.append(np.array([len(part) for part in parts]))
            else:
                part, count = self._arrays.encode_group(group)
                ids.append(part)
                counts.append(count)
        return np.concatenate(ids), np.concatenate(counts)


class _Ids:
    """The ids of every slot: slot i has ids[starts[i] : starts[i] + lengths[i]]."""

    def __init__(self):
        self.starts, self.lengths, self.ids = Column(np.int64), Column(np.int32), Column(np.int32)

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        self.starts.extend(self.ids.size + np.cumsum(lengths, dtype=np.int64) - lengths)
        self.lengths.extend(lengths)
        self.ids.extend(ids)

    def of(self, slots: np.ndarray) -> np.ndarray:
        return gather(self.ids.values, self.starts.values.take(slots), self.counts(slots))

    def counts(self, slots: np.ndarray) -> np.ndarray:
        return self.lengths.values.take(slots)


class _ArrayCache:
    def __init__(self, merges: Merges, rules, cache_words: int):
        self._merges, self._rules, self._cache_words = merges, rules, cache_words
        self._clear()

    def _clear(self) -> None:
        self._table, self._ids = WordTable(), _Ids()

    def encode(self, text: str) -> np.ndarray:
        data = text.encode()
        slots = self._slots(data, word_starts(text, data, self._rules))
        return self._ids.of(slots)

    def encode_group(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Texts with a break after each, so that they share the work; the break has no ids."""
        data, starts, is_break = joined_word_starts(texts, self._rules)
        slots = self._slots(data, starts)
        counts = self._ids.counts(slots)
        counts[is_break] = 0
        ids = gather(self._ids.ids.values, self._ids.starts.values.take(slots), counts)
        return ids, np.diff(np.cumsum(counts, dtype=np.int64)[is_break], prepend=0)

    def _slots(self, data: bytes, starts: np.ndarray) -> np.ndarray:
        if self._table.count > self._cache_words or self._ids.ids.size > 8 * self._cache_words:
            self._clear()
        try:
            slots, fresh = self._table.slots(data, starts, LONGEST_SHORT_WORD)
            if len(fresh):
                lengths = np.diff(starts, append=len(data))[fresh]
                self._ids.add(*self._merges.encode_packed(gather(np.frombuffer(data, np.uint8), starts[fresh], lengths), lengths))
        except BaseException:  # stopped half-way, even by Ctrl-C, table and ids would no longer belong together
            self._clear()
            raise
        return slots


class _DictionaryCache:
    def __init__(self, merges: Merges, splitter: Splitter, cache_words: int):
        self._merges, self._splitter, self._cache_words = merges, splitter, cache_words
        self._clear()

    def _clear(self) -> None:
        self._slots, self._ids = _Slots(), _Ids()

    def encode(self, text: str) -> np.ndarray:
        if not text.isascii():
            text.encode()
        if self._slots.count > self._cache_words or self._ids.ids.size > 8 * self._cache_words:
            self._clear()
        words = self._splitter.words(text)
        try:
            slots = np.fromiter(map(self._slots.__getitem__, words), np.int32, len(words))
            if self._slots.fresh:
                fresh = [word.encode() for word in self._slots.fresh]
                lengths = np.fromiter(map(len, fresh), np.int64, len(fresh))
                self._ids.add(*self._merges.encode_packed(np.frombuffer(b"".join(fresh), np.uint8), lengths))
                self._slots.fresh = []
        except BaseException:
            self._clear()
            raise
        return self._ids.of(slots)


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
