"""Scores and logits of many positions, made a piece at a time: how many logits a device holds does not grow with the batch.

Pieces have power-of-two lengths, so few shapes are compiled; the last one is filled up with position 0.
"""

from collections.abc import Callable, Iterator

import numpy as np

from smedjan_common.backend import IGNORED, Scores

PIECE_BYTES = 1 << 28  # float32 logits held at once
LEAST = 16  # positions; smaller pieces gain nothing


def scores_in_pieces(
    targets: np.ndarray, vocab: int, top: int, piece: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, ...]]
) -> Scores:
    """The scores of the counted ones of `targets`, int32 [B, T] or [B, T, K].

    piece(places int32 [N], targets int32 [N]) gives the four arrays of Scores for positions, numbered through [B, T].
    """
    shape, flat = targets.shape, targets.ravel()
    counted = np.flatnonzero(flat != IGNORED)
    each = int(np.prod(shape[2:], dtype=np.int64))
    result = Scores(
        np.zeros(flat.size, np.float32),
        np.zeros(flat.size, bool),
        np.zeros((flat.size, top), np.int32),
        np.zeros((flat.size, top), np.float32),
    )
    for part, padded in _pieces(counted, vocab):
        for whole, values in zip(result, piece((padded // each).astype(np.int32), np.maximum(flat[padded], 0)), strict=True):
            whole[part] = values[: len(part)]
    return Scores(*(whole.reshape(*shape, *whole.shape[1:]) for whole in result))


def logits_in_pieces(shape: tuple[int, ...], vocab: int, piece: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """float32 [*shape, vocab] of piece(places int32 [N]), float32 [N, vocab]."""
    places = np.arange(int(np.prod(shape, dtype=np.int64)), dtype=np.int32)
    whole = np.empty((len(places), vocab), np.float32)
    for part, padded in _pieces(places, vocab):
        whole[part] = piece(padded)[: len(part)]
    return whole.reshape(*shape, vocab)


def power_of_two(number: int) -> int:
    """The least power of two that is not under `number`, 1 for 0."""
    return 1 << max(number - 1, 0).bit_length()


def _pieces(places: np.ndarray, vocab: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(some of `places`, the same filled up to the length of a piece)."""
    most = max(LEAST, power_of_two(PIECE_BYTES // (4 * vocab) + 1) // 2)
    size = min(most, max(LEAST, power_of_two(len(places))))
    for start in range(0, len(places), size):
        part = places[start : start + size]
        yield part, np.pad(part, (0, size - len(part)))
