"""Text to token ids at speed: split into words, look each word up, encode together the words never seen before, gather all ids.

Two ways with the same answer (tests hold them together). Long text of a pattern with array rules (fast_split.py) stays in arrays
from its bytes to its ids, 256 KiB at a time; short text, and text of one's own pattern, is split by the regular expression and looked
up in a dictionary. Words longer than 64 bytes are not kept, and a cache is emptied when it passes its size.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from smedjan_common.tokenizer.arrays import Column, gather, groups
from smedjan_common.tokenizer.bpe import LONGEST_SHORT_WORD, Merges
from smedjan_common.tokenizer.fast_split import RULES, joined_word_starts, word_starts
from smedjan_common.tokenizer.patterns import Splitter
from smedjan_common.tokenizer.word_table import WordTable

CACHE_WORDS = 1 << 19
_BLOCK = 1 << 18  # characters; what is computed for a block stays in the processor's cache
_TOGETHER = 32  # blocks whose unknown words are encoded in one go
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
        blocks = self._splitter.blocks(text, _BLOCK)
        if self._arrays is None or len(text) < self._short_text:
            return _joined([self._dictionary.encode(block) for block in blocks])
        return _joined([ids for ids, _ in self._arrays.encode([block] for block in blocks)])

    def encode_many(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of many texts one after another, int32 [total], and how many each has, int64 [texts]."""
        if self._arrays is None:
            parts = [self.encode(text) for text in texts]
            return _joined(parts), np.array(list(map(len, parts)), np.int64)
        jobs, owner = [], []  # a long text is several jobs of one block, short ones share a job
        for number, group in enumerate(groups(texts, _BLOCK)):
            pieces = [[block] for block in self._splitter.blocks(group[0], _BLOCK)] if len(group) == 1 and group[0] else [group]
            jobs += pieces
            owner += [number] * len(pieces)
        encoded = self._arrays.encode(jobs)
        counts, last = [np.empty(0, np.int64)], -1
        for number, (_, count) in zip(owner, encoded, strict=True):
            if number == last:
                counts[-1] = counts[-1] + count
            else:
                counts.append(count)
            last = number
        return _joined([ids for ids, _ in encoded]), np.concatenate(counts)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0, np.int32)


class _Ids:
    """The ids of every slot: slot i has ids[starts[i] : starts[i] + lengths[i]]."""

    def __init__(self):
        self.starts, self.lengths, self.ids = Column(np.int64), Column(np.int32), Column(np.int32)

    def add(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        self.starts.extend(self.ids.size + np.cumsum(lengths, dtype=np.int64) - lengths)
        self.lengths.extend(lengths)
        self.ids.extend(ids)

    def of(self, slots: np.ndarray, breaks: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(ids of the words, how many come from each text); the words numbered in `breaks` end a text and give no ids."""
        lengths = self.lengths.values.take(slots)
        if breaks is not None:
            lengths[breaks] = 0
        ids = gather(self.ids.values, self.starts.values.take(slots), lengths)
        if breaks is None:
            return ids, np.array([len(ids)], np.int64)
        return ids, np.diff(np.cumsum(lengths, dtype=np.int64)[breaks], prepend=0)


class _ArrayCache:
    def __init__(self, merges: Merges, rules, cache_words: int):
        self._merges, self._rules, self._cache_words = merges, rules, cache_words
        self._clear()

    def _clear(self) -> None:
        self._table, self._ids = WordTable(), _Ids()

    def encode(self, jobs: Iterable[Sequence[str]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Each job's texts: (ids int32 one text after another, how many each text has int64 [texts])."""
        out, run = [], []
        for job in jobs:
            run.append(job)
            if len(run) == _TOGETHER:
                out += self._encode_run(run)
                run = []
        return out + self._encode_run(run)

    def _encode_run(self, jobs: list[Sequence[str]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Jobs whose unknown words are encoded together, which is what makes it fast."""
        if self._table.count > self._cache_words or self._ids.ids.size > 8 * self._cache_words:
            self._clear()
        split = [self._split(job) for job in jobs]  # raises at lone surrogates
        try:
            found = [self._look_up(data, starts) for data, starts, _ in split]
            fresh = [(words, lengths) for _, words, lengths in found if len(lengths)]
            if fresh:
                self._ids.add(*self._merges.encode_packed(*map(np.concatenate, zip(*fresh, strict=True))))
        except BaseException:  # stopped half-way, even by Ctrl-C, table and ids would no longer belong together
            self._clear()
            raise
        return [self._ids.of(slots, breaks) for (slots, _, _), (_, _, breaks) in zip(found, split, strict=True)]

    def _split(self, texts: Sequence[str]) -> tuple[bytes, np.ndarray, np.ndarray | None]:
        """(UTF-8, word starts, which words stand between the texts or None for one text)."""
        if len(texts) == 1:
            data = texts[0].encode()
            return data, word_starts(texts[0], data, self._rules), None
        return joined_word_starts(texts, self._rules)

    def _look_up(self, data: bytes, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(slots int32 [words], the bytes uint8 of words never seen before, their lengths)."""
        slots, fresh = self._table.slots(data, starts, LONGEST_SHORT_WORD)
        lengths = np.diff(starts, append=len(data))[fresh]
        return slots, gather(np.frombuffer(data, np.uint8), starts[fresh], lengths), lengths


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
        return self._ids.of(slots)[0]


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
