"""Encoding many texts in processes; results come back as arrays."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from smedjan_common.text.cuts import mend_surrogates
from smedjan_common.tokenizer.encoder import Encoder
from smedjan_common.tokenizer.patterns import Splitter
from smedjan_common.tokenizer.vocabulary import Vocabulary
from smedjan_common.workers import Workers, processes

_ENOUGH = 16 << 20  # characters; below it starting processes takes longer
_SHARE = 1 << 20  # characters that are sent to a process at once


class EncodesMany(Protocol):
    """A Tokenizer, as far as it is used here."""

    vocabulary: Vocabulary

    def encode_many(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]: ...


class EncodeShare:
    """What runs in each process: texts -> (ids int32, counts int64)."""

    def __init__(self, vocabulary: Vocabulary):
        self._encoder = Encoder(vocabulary.compile(), Splitter(vocabulary.pattern))

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return encode_many(self._encoder, texts)


def encode_many(encoder: Encoder, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The ids of many texts one after another, int32 [total], and how many each has, int64 [texts]; lone surrogates are U+FFFD."""
    try:
        return encoder.encode_many(texts)
    except UnicodeEncodeError:
        return encoder.encode_many([mend_surrogates(text) for text in texts])


def encode_in_processes(tokenizer: EncodesMany, texts: Sequence[str], workers: int | None) -> tuple[np.ndarray, np.ndarray]:
    """`Tokenizer.encode_many` in processes: (ids int32 [total], counts int64 [texts])."""
    count = processes(workers, sum(map(len, texts)), _ENOUGH)
    if count == 1:
        return tokenizer.encode_many(texts)
    with Workers("smedjan_common.tokenizer.batch:EncodeShare", (tokenizer.vocabulary,), count) as pool:
        parts = list(pool.map(_shares(texts)))
    return np.concatenate([ids for ids, _ in parts]), np.concatenate([counts for _, counts in parts])


def _shares(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    first, size = 0, 0
    for number, text in enumerate(texts):
        if size > _SHARE:
            yield texts[first:number]
            first, size = number, 0
        size += len(text)
    yield texts[first:]
