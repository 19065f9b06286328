"""The batch of each step: an order says which pieces of the tokens it has (order.py, mixture.py), a cut reads them.

Cuts: windows of the text as one stream (`Windows`), rows of whole documents (`Packed`), pieces of several files (`Mixed`).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from smedjan_common.data.mixture import Mixed, MixedOrder, Mixture
from smedjan_common.data.order import IGNORED, BatchOrder, Windows, eval_batches
from smedjan_common.data.packing import Packed
from smedjan_common.data.token_file import TokenFile

CUTS: dict[str, type[Windows] | type[Packed]] = {"windows": Windows, "documents": Packed}  # by TrainConfig.packing


class Batch(NamedTuple):
    """inputs int32 [B, T]; targets int32 [B, T], -1 where a row has no more text; documents int32 [B, T]: which document of its row
    each input is of, counted from 0, None where nobody asked."""

    inputs: np.ndarray
    targets: np.ndarray
    documents: np.ndarray | None


class Order(Protocol):
    """Which pieces make the batch of each step."""

    batch_size: int

    def windows(self, step: int, rows: slice | None = None) -> Any:
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
    """`batch(step)`, a pure function of (order, cut, step). `documents`: whether batches say the documents of their tokens."""

    def __init__(self, order: Order, cut: Cut, documents: bool = False):
        self.order, self.cut, self._documents = order, cut, documents
        self.num_windows, self.seq_len, self.batch_size = cut.num_windows, cut.seq_len, order.batch_size
        self.steps_per_epoch = -(-self.num_windows // self.batch_size)

    def batch(self, step: int, rows: slice | None = None) -> Batch:
        """The batch of a step, or its rows `rows`. Raises DataError where documents are asked for and the file has no offsets."""
        pieces = self.order.windows(step, rows)
        return Batch(*self.cut.read(pieces), self.cut.documents(pieces) if self._documents else None)


def batches(
    data: TokenFile | Mixture, seq_len: int, batch_size: int, seed: int, packing: str = "windows", documents: bool = False
) -> Batches:
    """The batches of one token file or of a mixture, a pure function of (data, seed, step). Raises DataError for too few tokens."""
    if isinstance(data, Mixture):
        cuts = [CUTS[packing](file, seq_len) for file in data.files]
        order = MixedOrder([cut.num_windows for cut in cuts], data.weights, batch_size, seed)
        return Batches(order, Mixed(cuts), documents)
    cut = CUTS[packing](data, seq_len)
    return Batches(BatchOrder(cut.num_windows, batch_size, seed), cut, documents)


def held_out(
    data: TokenFile, seq_len: int, batch_size: int, max_batches: int | None = None, documents: bool = False
) -> Iterator[tuple[np.ndarray, ...]]:
    """What a run validates on: windows as `eval_batches` has them; of a file with a mask its packed rows, so that no answer loses its
    question, evenly spread where there are more than `max_batches`. Every batch is [batch_size, seq_len]."""
    if data.mask is None:
        yield from eval_batches(data, seq_len, batch_size, max_batches, documents)
        return
    cut = Packed(data, seq_len)
    most = cut.num_windows if max_batches is None else max_batches * batch_size
    rows = np.arange(cut.num_windows) if cut.num_windows <= most else np.arange(most) * cut.num_windows // most
    for first in range(0, len(rows), batch_size):
        part = rows[first : first + batch_size]
        full = np.append(part, np.zeros(batch_size - len(part), np.int64))
        inputs, targets = cut.read(full)
        targets[len(part) :] = IGNORED
        yield (inputs, targets, cut.documents(full)) if documents else (inputs, targets)
