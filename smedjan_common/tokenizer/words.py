"""Counted words in packed arrays: what counting hands to learning, cheap to send between processes and to add up.

Text of a pattern with array rules is counted in arrays (fast_split.py, word_table.py); `count_plain` is the definition.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from smedjan_common.text.blocks import Block
from smedjan_common.text.cuts import mend_surrogates
from smedjan_common.text.documents import documents
from smedjan_common.tokenizer.arrays import Column, gather, groups
from smedjan_common.tokenizer.fast_split import RULES, joined_word_starts, word_starts
from smedjan_common.tokenizer.patterns import Splitter
from smedjan_common.tokenizer.word_table import WordTable

MOST_WORDS = 1 << 24  # distinct words that a process remembers, about 1 GiB; past it those met once are dropped
_BLOCK = 1 << 18
_ANY_LENGTH = 1 << 62


class WordCounts(NamedTuple):
    """`data` uint8: the words' bytes one after another; `lengths` int64 [words]; `counts` int64 [words]; `dropped`: words left out."""

    data: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray
    dropped: int = 0


def pack(counter: dict[bytes, int]) -> WordCounts:
    """A dictionary of words as packed arrays, in its order."""
    return WordCounts(
        np.frombuffer(b"".join(counter), np.uint8),
        np.fromiter(map(len, counter), np.int64, len(counter)),
        np.fromiter(counter.values(), np.int64, len(counter)),
    )


def unpack(counts: WordCounts) -> dict[bytes, int]:
    """Packed arrays as a dictionary."""
    data, ends = counts.data.tobytes(), np.cumsum(counts.lengths).tolist()
    return {data[start:end]: n for start, end, n in zip([0, *ends], ends, counts.counts.tolist(), strict=False)}


def count_plain(texts: Iterable[str], splitter: Splitter) -> WordCounts:
    """The definition of counting: words of each text, one by one."""
    counter: Counter[str] = Counter()
    for text in texts:
        counter.update(splitter.words(mend_surrogates(text)))
    return pack({word.encode(): count for word, count in counter.items()})


class Tally:
    """Counts of words, added to in arrays. Past `most` distinct words those counted once are dropped, as often as needed."""

    def __init__(self, most: int = MOST_WORDS):
        self._most, self.dropped = most, 0
        self._empty()

    def _empty(self) -> None:
        self._table, self._data, self._lengths, self._counts = WordTable(), Column(np.uint8), Column(np.int64), Column(np.int64)

    def add(self, data: bytes, starts: np.ndarray, counts: np.ndarray | None = None, left_out: np.ndarray | None = None) -> None:
        """Words of `data` that begin at `starts`, each once or `counts` times; those numbered in `left_out` not at all."""
        slots, fresh = self._table.slots(data, starts, _ANY_LENGTH)
        if len(fresh):
            lengths = np.diff(starts, append=len(data))[fresh]
            self._data.extend(gather(np.frombuffer(data, np.uint8), starts[fresh], lengths))
            self._lengths.extend(lengths)
            self._counts.extend(np.zeros(len(fresh), np.int64))
        if counts is None:
            more = np.bincount(slots)
            if left_out is not None:
                more -= np.bincount(slots[left_out], minlength=len(more))
            self._counts.values[: len(more)] += more
        else:
            np.add.at(self._counts.values, slots, counts)
        if self._table.count > self._most:
            self._drop()

    def _drop(self) -> None:
        old = self.result()
        often = old.counts > 1
        self._empty()
        self.dropped += int((~often).sum())
        self._most = max(self._most, 2 * int(often.sum()))
        lengths = old.lengths[often]
        self.add(old.data[np.repeat(often, old.lengths)].tobytes(), np.cumsum(lengths) - lengths, old.counts[often])

    def result(self) -> WordCounts:
        data, lengths, counts = self._data.values, self._lengths.values, self._counts.values
        met = counts > 0
        if not met.all():
            data, lengths, counts = data[np.repeat(met, lengths)], lengths[met], counts[met]
        return WordCounts(data, lengths, counts, self.dropped)


def add(parts: list[WordCounts]) -> WordCounts:
    """The sum of several counts."""
    if len(parts) == 1:
        return parts[0]
    total = Tally(_ANY_LENGTH)
    for part in parts:
        total.add(part.data.tobytes(), np.cumsum(part.lengths) - part.lengths, part.counts)
    return total.result()._replace(dropped=sum(part.dropped for part in parts))


class WordCounter:
    """Counts the words of block after block; what runs in each process. `finish()`: the WordCounts so far."""

    def __init__(self, expression: str, field: str = "text", errors: str = "strict", most: int = MOST_WORDS):
        self._splitter, self._field, self._errors = Splitter(expression), field, errors
        self._rules, self._tally = RULES.get(expression), Tally(most)

    def __call__(self, blocks: list[Block]) -> int:
        """Count some blocks; their size in bytes."""
        self.add_texts([text for block in blocks for text in documents(block, self._field, self._errors)])
        return sum(len(block.data) for block in blocks)

    def add_texts(self, texts: list[str]) -> None:
        """Count the words of texts."""
        for group in groups(texts, _BLOCK):
            try:
                self._add_group(group)
            except UnicodeEncodeError:
                self._add_group([mend_surrogates(text) for text in group])

    def _add_group(self, group: Sequence[str]) -> None:
        if self._rules and len(group) > 1:
            data, starts, breaks = joined_word_starts(group, self._rules)
            self._tally.add(data, starts, left_out=breaks)
            return
        "".join(group).encode()  # refuses lone surrogates before anything is counted
        for part in (part for text in group for part in self._splitter.blocks(text, _BLOCK)):
            if self._rules:
                data = part.encode()
                self._tally.add(data, word_starts(part, data, self._rules))
            else:
                packed = pack({word.encode(): count for word, count in Counter(self._splitter.words(part)).items()})
                self._tally.add(packed.data.tobytes(), np.cumsum(packed.lengths) - packed.lengths, packed.counts)

    def finish(self) -> WordCounts:
        return self._tally.result()

    @staticmethod
    def merge(parts: list[WordCounts]) -> WordCounts:
        """Several of what `finish` gives, as one."""
        return add(parts)


def count_texts(texts: Iterable[str], splitter: Splitter) -> WordCounts:
    """Words of an iterable of texts, counted in this process."""
    counter, waiting, size = WordCounter(splitter.expression), [], 0
    for text in texts:
        waiting.append(text)
        size += len(text)
        if size > _BLOCK:
            counter.add_texts(waiting)
            waiting, size = [], 0
    counter.add_texts(waiting)
    return counter.finish()
