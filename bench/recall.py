"""Two synthetic tasks of recall, as token sequences: multi-query associative recall and selective copying.

associative: `count` pairs (key, value), all keys different, then keys of them at random to the end; the target at such a key is its
    value ("Zoology", Arora et al. 2023).
copying: `count` data tokens strewn among blanks, then `count` marks; the targets of the marks are the data tokens in their order
    ("Mamba", Gu and Dao 2023).

Tokens: BLANK, MARK, then two alphabets of LETTERS tokens (keys or data, and values). Targets are -1 where nothing is asked.
Shapes: B sequences, T positions.
"""

from collections.abc import Callable

import numpy as np

BLANK, MARK, LETTERS = 0, 1, 32
VOCAB_SIZE = 2 + 2 * LETTERS
DATA = 16  # letters that copying uses

Batch = tuple[np.ndarray, np.ndarray]


def associative(rng: np.random.Generator, counts: np.ndarray, length: int) -> Batch:
    """(inputs, targets) int32 [B, T]; `counts` [B] pairs in each row, fewer than length / 2."""
    inputs, targets = _empty(len(counts), length)
    for row, count in enumerate(counts):
        keys = rng.choice(LETTERS, count, replace=False) + 2
        values = rng.integers(LETTERS, size=count) + 2 + LETTERS
        inputs[row, 0 : 2 * count : 2], inputs[row, 1 : 2 * count : 2] = keys, values
        asked = rng.integers(count, size=length - 2 * count)
        inputs[row, 2 * count :], targets[row, 2 * count :] = keys[asked], values[asked]
    return inputs, targets


def copying(rng: np.random.Generator, counts: np.ndarray, length: int) -> Batch:
    """(inputs, targets) int32 [B, T]; `counts` [B] data tokens in each row, at most length // 2."""
    inputs, targets = _empty(len(counts), length)
    for row, count in enumerate(counts):
        data = rng.integers(DATA, size=count) + 2
        inputs[row, np.sort(rng.choice(length - count, count, replace=False))] = data
        inputs[row, length - count :], targets[row, length - count :] = MARK, data
    return inputs, targets


def _empty(rows: int, length: int) -> Batch:
    return np.full((rows, length), BLANK, np.int32), np.full((rows, length), -1, np.int32)


def stage(progress: float, length: int, counts: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """(T, counts) to train on when `progress` (0 to 1) of the steps are done: sequences get longer, or attention needs many more steps."""
    for until, short, few in ((0.3, 8, (2,)), (0.4, 16, (2, 4)), (0.55, 32, (2, 4, 8))):
        if progress < until and short < length:
            return short, few
    return length, counts


TASKS: dict[str, Callable[[np.random.Generator, np.ndarray, int], Batch]] = {"associative": associative, "copying": copying}
