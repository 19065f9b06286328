"""Batches of whole documents: rows filled by best fit, so that a document that fits is never cut.

A document of L tokens gives L - 1 positions, inputs x_0 … x_{L-2} with targets x_1 … x_{L-1}; one with more than T positions is cut into
stretches of T first. Stretches are placed from the longest to the shortest, each into the fullest row that has room (best fit decreasing,
Johnson 1974), which on real text fills 99.9 % of the positions, where cutting text into windows cuts every fifth document. No target
reaches into another document; attention stays inside by `documents`. The rows of each epoch are permuted as windows are (order.py).

Pairs of answers, two documents each, are placed as one: no pair is parted between rows, so none between the parts of a step or devices.
"""

import numpy as np

from smedjan_common.data.order import IGNORED, document_offsets
from smedjan_common.data.token_file import TokenFile
from smedjan_common.errors import DataError


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each stretch, int64 [stretches], for lengths of 1 to `capacity`; rows are numbered as they are opened.

    Rows with r free positions wait in the list `open_rows[r]`; `free` has bit r set where that list is not empty, so the fullest row
    with room for n is the lowest set bit at or above n.
    """
    rows = np.empty(len(lengths), np.int64)
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]
    free, count = 0, 0
    order = np.argsort(-lengths, kind="stable")
    for number, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = free >> length
        if fitting:
            room = (fitting & -fitting).bit_length() - 1 + length
            row = open_rows[room].pop()
            if not open_rows[room]:
                free &= ~(1 << room)
        else:
            room, row, count = capacity, count, count + 1
        rows[number] = row
        if room > length:
            open_rows[room - length].append(row)
            free |= 1 << (room - length)
    return rows


def stretches(documents: np.ndarray, num_tokens: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """(first token int64, positions int64) of the stretches of documents that start at `documents`."""
    starts = documents.astype(np.int64)
    positions = np.diff(np.append(starts, num_tokens)) - 1
    starts, positions = starts[positions > 0], positions[positions > 0]
    pieces = -(-positions // seq_len)
    number = np.arange(int(pieces.sum())) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    return np.repeat(starts, pieces) + number * seq_len, np.minimum(np.repeat(positions, pieces) - number * seq_len, seq_len)


class Packed:
    """The rows of whole documents of a token file. `fill`: the part of the positions that is text, the rest has target -1."""

    def __init__(self, token_file: TokenFile, seq_len: int):
        starts, lengths = stretches(document_offsets(token_file), token_file.num_tokens, seq_len)
        if not len(starts):
            raise DataError(f"The dataset {str(token_file.path)!r} has no documents of two tokens.", "", "Prepare more text.")
        self._place(token_file, seq_len, starts, lengths, best_fit(lengths, seq_len))

    def _place(self, token_file: TokenFile, seq_len: int, starts: np.ndarray, lengths: np.ndarray, rows: np.ndarray) -> None:
        self._order = order = np.argsort(rows, kind="stable")
        self._starts, self._lengths = starts[order], lengths[order]
        self.num_windows = int(rows.max()) + 1
        self._first = np.searchsorted(rows[order], np.arange(self.num_windows + 1))
        self._tokens, self._mask, self.seq_len = token_file.tokens, token_file.mask, seq_len
        self.fill = float(lengths.sum() / (self.num_windows * seq_len))

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(inputs int32 [B, T], targets int32 [B, T], -1 where a row has no more text or the mask is 0) of packed rows int64 [B]."""
        inputs = np.zeros((len(numbers), self.seq_len), np.int32)
        targets = np.full((len(numbers), self.seq_len), IGNORED, np.int32)
        for row, number in enumerate(numbers.tolist()):
            at = 0
            for start, length in self._of(number):
                piece = self._tokens[start : start + length + 1]
                inputs[row, at : at + length], targets[row, at : at + length] = piece[:-1], piece[1:]
                if self._mask is not None:
                    targets[row, at : at + length][self._mask[start + 1 : start + length + 1] == 0] = IGNORED
                at += length
        return inputs, targets

    def documents(self, numbers: np.ndarray) -> np.ndarray:
        """The stretch of each position, int32 [B, T] from 0 in each row; the rest of a row counts as one more, so that it sees itself."""
        out = np.empty((len(numbers), self.seq_len), np.int32)
        for row, number in enumerate(numbers.tolist()):
            lengths = [length for _, length in self._of(number)]
            out[row] = np.repeat(np.arange(len(lengths) + 1), [*lengths, self.seq_len - sum(lengths)])
        return out

    def _of(self, number: int) -> list[tuple[int, int]]:
        inside = slice(self._first[number], self._first[number + 1])
        return list(zip(self._starts[inside].tolist(), self._lengths[inside].tolist(), strict=True))


class PackedPairs(Packed):
    """The rows of whole pairs. pairs_of_row: how many the fullest one has; num_pairs: how many there are."""

    def __init__(self, token_file: TokenFile, seq_len: int):
        starts = document_offsets(token_file).astype(np.int64)
        lengths = np.diff(np.append(starts, token_file.num_tokens)) - 1
        units = lengths[0::2] + lengths[1::2] if len(lengths) % 2 == 0 else lengths[:0]
        if not len(units) or lengths.min() < 1:
            raise DataError(f"The token file {str(token_file.path)!r} holds no pairs.", "", "Make it again: smedjan dpo --dataset PAIRS.")
        if (longest := int(units.max())) > seq_len:
            what = f"A pair of {str(token_file.path)!r} has {longest} tokens to read."
            raise DataError(what, f"A row has --seq-len {seq_len}, and pairs are not parted.", f"Take --seq-len {longest} or more.")
        rows = best_fit(units, seq_len)
        self.num_pairs, self.pairs_of_row = len(units), int(np.bincount(rows).max())
        self._place(token_file, seq_len, starts, lengths, np.repeat(rows, 2))

    def numbers(self, rows: np.ndarray) -> np.ndarray:
        """Which document of the file each one of packed rows [B] is, int64 [B, 2 * pairs_of_row]; -1: there is none. Pair j of a row is
        its documents 2j, the better answer, and 2j + 1."""
        out = np.full((len(rows), 2 * self.pairs_of_row), -1, np.int64)
        for place, row in enumerate(rows.tolist()):
            inside = self._order[self._first[row] : self._first[row + 1]]
            out[place, : len(inside)] = inside
        return out
