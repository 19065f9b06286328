"""Which windows of a token file make the batch of step s: a pure function of (number of windows, seed, s).

Windows have seq_len + 1 tokens at stride seq_len: targets are inputs shifted by one. There are n = (num_tokens - 1) // seq_len.
Row i of step s is sample r = s * batch_size + i, of epoch e = r // n, window P_e(r mod n). P_e is a permutation of 0 … n-1: a Feistel
network of 4 rounds on the next even number of bits, walked until it lands below n (Black and Rogaway 2002, "Ciphers with arbitrary
finite domains"). Round keys come from blake2b(seed, e, n). Integers only, so every machine and backend gets the same order; no state,
so a run resumes at any step at once, and each host reads its own rows.
"""

import hashlib
from collections.abc import Iterator

import numpy as np

from smedjan_common.backend import IGNORED
from smedjan_common.data.token_file import TokenFile
from smedjan_common.errors import DataError

Rows = slice | np.ndarray | None  # of a batch; None: all

_ROUNDS = 4
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # SplitMix64 (Steele, Lea, Flood 2014)


class BatchOrder:
    """The windows of every step, of `num_windows` in all."""

    def __init__(self, num_windows: int, batch_size: int, seed: int):
        if batch_size < 1:
            raise DataError(f"Batches of {batch_size} windows make no sense.", "", "Give at least 1.")
        self.num_windows, self.batch_size, self.seed = num_windows, batch_size, seed

    def windows(self, step: int, rows: Rows = None) -> np.ndarray:
        """Window numbers int64 [batch_size] of a step, or of its rows `rows`."""
        row = np.arange(self.batch_size, dtype=np.int64)[rows if rows is not None else slice(None)]
        sample = step * self.batch_size + row
        epoch, place = np.divmod(sample, self.num_windows)
        out = np.empty(len(sample), np.int64)
        for number in np.unique(epoch):
            inside = epoch == number
            out[inside] = permute(place[inside], self.num_windows, self.seed, int(number))
        return out


def permute(places: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where each of `places` (int64, 0 <= place < n) goes in the permutation of an epoch."""
    half = np.uint64(max(1, (max(n - 1, 1).bit_length() + 1) // 2))
    keys = _round_keys(seed, epoch, n)
    out = _feistel(places.astype(np.uint64), half, keys)
    outside = np.flatnonzero(out >= n)
    while len(outside):  # the domain is at most 4n, so a few steps
        out[outside] = _feistel(out[outside], half, keys)
        outside = outside[out[outside] >= n]
    return out.astype(np.int64)


def _round_keys(seed: int, epoch: int, n: int) -> np.ndarray:
    digest = hashlib.blake2b(f"smedjan-order-1:{seed}:{epoch}:{n}".encode(), digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, "<u8")


def _feistel(values: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    """A bijection of 0 … 4^half - 1."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        mixed = (right ^ key) * _MIX[0]
        mixed = (mixed ^ mixed >> np.uint64(27)) * _MIX[1]
        left, right = right, left ^ (mixed ^ mixed >> np.uint64(31)) & mask
    return left << half | right


class Windows:
    """The windows of a token file: how text is cut as one stream. Raises DataError when the file is too short for one."""

    def __init__(self, token_file: TokenFile, seq_len: int):
        if seq_len < 1:
            raise DataError(f"Windows of {seq_len} tokens make no sense.", "", "Give at least 1.")
        tokens = token_file.num_tokens
        if tokens < seq_len + 1:
            fix = f"Use --seq-len {tokens - 1} or less, or more text." if tokens > 1 else "Prepare more text."
            raise DataError(f"The dataset is too short for --seq-len {seq_len}.", f"It has {tokens} tokens; {seq_len + 1} are needed.", fix)
        self._file, self.seq_len = token_file, seq_len
        self.num_windows = (tokens - 1) // seq_len

    def read(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(inputs int32 [B, T], targets int32 [B, T], -1 where the file's mask is 0) of windows int64 [B]."""
        inputs, targets = read_windows(self._file.tokens, windows, self.seq_len)
        if self._file.mask is not None:
            targets[read_windows(self._file.mask, windows, self.seq_len)[1] == 0] = IGNORED
        return inputs, targets

    def documents(self, windows: np.ndarray) -> np.ndarray:
        """The document of each input token, int32 [B, T] from 0 in each row. Raises DataError without offsets."""
        return document_numbers(document_offsets(self._file), windows, self.seq_len)


def read_windows(tokens: np.ndarray, windows: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """(inputs int32 [B, T], targets int32 [B, T]) of windows int64 [B]."""
    both_BU = np.empty((len(windows), seq_len + 1), np.int32)
    for row, window in enumerate(windows):
        start = int(window) * seq_len
        both_BU[row] = tokens[start : start + seq_len + 1]
    return both_BU[:, :-1].copy(), both_BU[:, 1:].copy()


def document_offsets(token_file: TokenFile) -> np.ndarray:
    """Where the documents of a token file start, uint64. Raises DataError when it does not say."""
    if token_file.documents is None:
        raise DataError(
            f"{str(token_file.path)!r} has no document offsets.",
            "Packing and --mask-documents need them.",
            "Prepare it again: smedjan prepare.",
        )
    return token_file.documents


def document_numbers(documents: np.ndarray, windows: np.ndarray, seq_len: int) -> np.ndarray:
    """Which document each input token is of, int32 [B, T], counted from 0 in each row: what attention masks with.

    `documents`: where documents start, in tokens (`TokenFile.documents`), ascending; `windows` int64 [B].
    """
    first = windows[:, None] * seq_len
    number_BT = np.searchsorted(documents, (first + np.arange(seq_len)).astype(np.uint64), side="right")
    return (number_BT - number_BT[:, :1]).astype(np.int32)


def eval_batches(
    token_file: TokenFile, seq_len: int, batch_size: int, max_batches: int | None = None, documents: bool = False
) -> Iterator[tuple[np.ndarray, ...]]:
    """Every target of the file once, in order; or, if that takes more than `max_batches`, windows spread evenly over it.

    The last window and the last batch are padded with target -1 (ignored), so that every batch is [batch_size, seq_len]. A file
    shorter than one window gives one padded window. With `documents` each batch has a third array, the documents of its tokens.
    Raises DataError for a file with fewer than two tokens.
    """
    if token_file.num_tokens < 2:
        raise DataError(f"The dataset {str(token_file.path)!r} is too short.", "Evaluation needs two tokens.", "Prepare more text.")
    count = -(-(token_file.num_tokens - 1) // seq_len)
    most = count if max_batches is None else max_batches * batch_size
    windows = np.arange(count) if count <= most else np.arange(most) * count // most
    for first in range(0, len(windows), batch_size):
        part = windows[first : first + batch_size]
        batch = _padded(token_file.tokens, part, seq_len, batch_size)
        yield (*batch, _padded_documents(token_file, part, seq_len, batch_size)) if documents else batch


def _padded(tokens: np.ndarray, windows: np.ndarray, seq_len: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    inputs, targets = np.zeros((batch_size, seq_len), np.int32), np.full((batch_size, seq_len), IGNORED, np.int32)
    for row, window in enumerate(windows):
        piece = tokens[int(window) * seq_len : (int(window) + 1) * seq_len + 1]
        inputs[row, : len(piece) - 1], targets[row, : len(piece) - 1] = piece[:-1], piece[1:]
    return inputs, targets


def _padded_documents(token_file: TokenFile, windows: np.ndarray, seq_len: int, batch_size: int) -> np.ndarray:
    numbers = np.zeros((batch_size, seq_len), np.int32)
    numbers[: len(windows)] = document_numbers(document_offsets(token_file), windows, seq_len)
    return numbers
