"""Encoding many texts in processes; results come back as arrays."""

from collections.abc import Iterator, Sequence

import numpy as np

from smedjan_common.tokenizer.tokenizer import Tokenizer
from smedjan_common.workers import Workers, processes

_ENOUGH = 16 << 20  # characters; below it starting processes takes longer
_SHARE = 1 << 20  # characters that are sent to a process at once


class EncodeShare:
    """What runs in each process: texts -> (ids int32, counts int64)."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return self._tokenizer.encode_many(texts)


def encode_in_processes(tokenizer: Tokenizer, texts: Sequence[str], workers: int | None) -> tuple[np.ndarray, np.ndarray]:
    """`Tokenizer.encode_many` in processes: (ids int32 [total], counts int64 [texts])."""
    count = processes(workers, sum(map(len, texts)), _ENOUGH)
    if count == 1:
        return tokenizer.encode_many(texts)
    with Workers("smedjan_common.tokenizer.batch:EncodeShare", (tokenizer,), count) as pool:
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
