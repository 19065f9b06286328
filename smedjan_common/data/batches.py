"""The batch of each step: an order says which pieces of the tokens it has (order.py, mixture.py), a cut reads them.

Cuts: windows of the text as one stream (`Windows`), rows of whole documents (`Packed`) or of pairs of them (`PackedPairs`), pieces of
several files (`Mixed`).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from smedjan_common.data.mixture import Mixed, MixedOrder, Mixture
from smedjan_common.data.order import IGNORED, BatchOrder, Rows, Windows, eval_batches
from smedjan_common.data.packing import Packed, PackedPairs
from smedjan_common.data.token_file import TokenFile

CUTS: dict[str, type[Windows] | type[Packed]] = {"windows": Windows, "documents": Packed}  # by TrainConfig.packing


class Batch(NamedTuple):
    """inputs int32 [B, T]; targets int32 [B, T], -1 where a row has no more text; documents int32 [B, T]: which document of its row
    each input is of, counted from 0, None where nobody asked."""

    inputs: np.ndarray
    targets: np.ndarray
    documents: np.ndarray | None


class PairBatch(NamedTuple):
    """A batch of pairs. documents: pair j of a row is its documents 2j, the better answer, and 2j + 1. reference: float32
    [B, 2 * pairs of the fullest row], the log-probability that the reference gives to what is trained of each document of a row; 0 where
    there is no reference or no document."""

    inputs: np.ndarray
    targets: np.ndarray
    documents: np.ndarray | None
    reference: np.ndarray


class Order(Protocol):
    """Which pieces make the batch of each step."""

    batch_size: int

    def windows(self, step: int, rows: Rows = None) -> Any:
        """The pieces of a step, or of its rows `rows`, as the cut takes them."""
        ...


class Cut(Protocol):
    """Pieces of tokens by their number. `num_windows`: how many there are."""

    num_windows: int
    seq_len: int

    def read(self, pieces: Any, /) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets) of pieces."""
        ...

    def documents(self, pieces: Any, /) -> np.ndarray:
        """The documents of their inputs."""
        ...


class Batches:
    """`batch(step)`, a pure function of (order, cut, step). `documents`: whether batches say the documents of their tokens. reference:
    float32 [documents] of a file of pairs, None: zeros."""

    def __init__(self, order: Order, cut: Cut, documents: bool = False, reference: np.ndarray | None = None):
        self.order, self.cut, self._documents, self._reference = order, cut, documents, reference
        self.num_windows, self.seq_len, self.batch_size = cut.num_windows, cut.seq_len, order.batch_size
        self.steps_per_epoch = -(-self.num_windows // self.batch_size)

    def batch(self, step: int, rows: Rows = None) -> Batch | PairBatch:
        """The batch of a step, or its rows `rows`. Raises DataError where documents are asked for and the file has no offsets."""
        pieces = self.order.windows(step, rows)
        return _read(self.cut, pieces, self._documents, self._reference)


def batches(
    data: TokenFile | Mixture,
    seq_len: int,
    batch_size: int,
    seed: int,
    packing: str = "windows",
    documents: bool = False,
    reference: np.ndarray | None = None,
) -> Batches:
    """The batches of one token file or of a mixture, a pure function of (data, seed, step). Raises DataError for too few tokens."""
    if isinstance(data, Mixture):
        cuts = [CUTS[packing](file, seq_len) for file in data.files]
        order = MixedOrder([cut.num_windows for cut in cuts], data.weights, batch_size, seed)
        return Batches(order, Mixed(cuts), documents)
    cut = PackedPairs(data, seq_len) if data.pairs else CUTS[packing](data, seq_len)
    return Batches(BatchOrder(cut.num_windows, batch_size, seed), cut, documents, reference)


def _read(cut: Any, pieces: Any, documents: bool, reference: np.ndarray | None) -> Batch | PairBatch:
    inputs, targets = cut.read(pieces)
    named = cut.documents(pieces) if documents else None
    if isinstance(cut, PackedPairs):
        return PairBatch(inputs, targets, named, _of_documents(reference, cut.numbers(pieces)))
    return Batch(inputs, targets, named)


def _of_documents(reference: np.ndarray | None, numbers: np.ndarray) -> np.ndarray:
    if reference is None:
        return np.zeros(numbers.shape, np.float32)
    return np.where(numbers >= 0, reference[np.maximum(numbers, 0)], 0).astype(np.float32)


def held_out(
    data: TokenFile,
    seq_len: int,
    batch_size: int,
    max_batches: int | None = None,
    documents: bool = False,
    reference: np.ndarray | None = None,
) -> Iterator[tuple[np.ndarray, ...]]:
    """What a run validates on: windows as `eval_batches` has them; of a file with a mask its packed rows, so that no answer loses its
    question, evenly spread where there are more than `max_batches`. Every batch is [batch_size, seq_len]. Each has inputs and targets, with
    `documents` also the documents, and of pairs `reference` as Batch has it."""
    if data.mask is None:
        yield from eval_batches(data, seq_len, batch_size, max_batches, documents)
        return
    cut = PackedPairs(data, seq_len) if data.pairs else Packed(data, seq_len)
    most = cut.num_windows if max_batches is None else max_batches * batch_size
    rows = np.arange(cut.num_windows) if cut.num_windows <= most else np.arange(most) * cut.num_windows // most
    for first in range(0, len(rows), batch_size):
        part = rows[first : first + batch_size]
        full = np.append(part, np.zeros(batch_size - len(part), np.int64))
        batch = _read(cut, full, documents, reference)
        batch.targets[len(part) :] = IGNORED
        yield tuple(array for array in batch if array is not None)
