"""Counted words in packed arrays: what counting hands to learning, cheap to send between processes and to add up."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from smedjan_common.data.sources import Block, documents
from smedjan_common.tokenizer.patterns import Splitter, mend_surrogates


class WordCounts(NamedTuple):
    """`data` uint8: the words' bytes one after another; `lengths` int32 [words]; `counts` int64 [words]."""

    data: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray


def pack(counter: dict[bytes, int]) -> WordCounts:
    """A dictionary of words as packed arrays, in its order."""
    return WordCounts(
        np.frombuffer(b"".join(counter), np.uint8),
        np.fromiter(map(len, counter), np.int32, len(counter)),
        np.fromiter(counter.values(), np.int64, len(counter)),
    )


def unpack(counts: WordCounts) -> dict[bytes, int]:
    """Packed arrays as a dictionary."""
    data, ends = counts.data.tobytes(), np.cumsum(counts.lengths, dtype=np.int64).tolist()
    return {data[start:end]: n for start, end, n in zip([0, *ends], ends, counts.counts.tolist(), strict=False)}


def add(parts: Iterable[WordCounts]) -> WordCounts:
    """The sum of several counts."""
    total: dict[bytes, int] = {}
    for part in parts:
        if not total:
            total = unpack(part)
            continue
        get = total.get
        for word, count in unpack(part).items():
            total[word] = get(word, 0) + count
    return pack(total)


def count_plain(texts: Iterable[str], splitter: Splitter) -> WordCounts:
    """The definition of counting: words of each text, one by one."""
    counter: Counter[str] = Counter()
    for text in texts:
        counter.update(splitter.words(text))
    return pack({_utf8(word): count for word, count in counter.items()})


class WordCounter:
    """Counts the words of block after block; what runs in each process. `finish()`: the WordCounts so far."""

    def __init__(self, expression: str, field: str = "text", errors: str = "strict"):
        self._splitter, self._field, self._errors = Splitter(expression), field, errors
        self._counter: Counter[str] = Counter()

    def __call__(self, block: Block) -> int:
        """Count a block; its size in bytes."""
        for text in documents(block, self._field, self._errors):
            self.add_text(text)
        return len(block.data)

    def add_text(self, text: str) -> None:
        for part in self._splitter.blocks(text):
            self._counter.update(self._splitter.words(part))

    def finish(self) -> WordCounts:
        return pack({_utf8(word): count for word, count in self._counter.items()})


def count_texts(texts: Iterable[str], splitter: Splitter) -> WordCounts:
    """Words of an iterable of texts, counted in this process."""
    counter = WordCounter(splitter.expression)
    for text in texts:
        counter.add_text(text)
    return counter.finish()


def _utf8(word: str) -> bytes:
    try:
        return word.encode()
    except UnicodeEncodeError:
        return mend_surrogates(word).encode()
