"""Encoding many texts in processes; results come back as arrays."""

from collections.abc import Iterator, Sequence

import numpy as np

from smedjan_common.tokenizer.tokenizer import Tokenizer
from smedjan_common.workers import Workers, default_workers

_ONE_PROCESS_BELOW = 16 << 20  # characters; starting processes would take longer
_SHARE = 1 << 20  # characters that are sent to a process at once


class EncodeShare:
    """What runs in each process: texts -> (ids int32, counts int64)."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return self._tokenizer.encode_many(texts)


def encode_in_processes(tokenizer: Tokenizer, texts: Sequence[str], workers: int | None) -> tuple[np.ndarray, np.ndarray]:
    """`Tokenizer.encode_many` in processes: (ids int32 [total], counts int64 [texts])."""
    if workers is None:
        workers = default_workers() if sum(map(len, texts)) >= _ONE_PROCESS_BELOW else 1
    if workers <= 1:
        return tokenizer.encode_many(texts)
    with Workers("smedjan_common.tokenizer.batch:EncodeShare", (tokenizer,), workers) as pool:
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
