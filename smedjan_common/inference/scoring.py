"""Log-likelihoods of texts: documents in windows, continuations of contexts. lm.loss, lm.score, `smedjan eval` and the server's echo.

A document longer than the context is cut into windows that overlap. Each token is scored once, in the window where it is among the
last; a stride of the whole context is fastest, a shorter one gives each token at least `context - stride` tokens before it.

    stride = context    [0 1 2 3] [4 5 6 7]              each window scores all it has
    stride = context/2  [0 1 2 3] (2 3)[4 5] (4 5)[6 7]  those in round brackets are read only

The last window is moved back, so that it is full too. Rows are sorted by length and padded to powers of two: few shapes are compiled.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np

from smedjan_common.backend import IGNORED, Backend, Scores
from smedjan_common.errors import DataError, NotFiniteError
from smedjan_common.inference.pieces import LEAST, power_of_two

LOT = 64  # batches whose rows are sorted by length together
# positions of a forward pass, by the kind of the device; on a CPU more of them only leave its caches (bench.evaluation)
BATCH_TOKENS = {"cpu": 1024, "gpu": 1 << 15}


Item = TypeVar("Item")


class Window(NamedTuple):
    """Tokens [begin, end) of a text are looked at, and those from `first` on are scored."""

    begin: int
    first: int
    end: int


def windows(length: int, context: int, stride: int | None = None, first: int = 1) -> Iterator[Window]:
    """The windows that score tokens `first` to `length - 1`, each once and with a token before it. At most `context` tokens are read."""
    stride = context if stride is None else stride
    assert 1 <= stride <= context, "each token is scored once"
    assert first >= 1, "the first token has nothing before it"
    step = context
    while first < length:
        end = min(first + step, length)
        yield Window(max(0, end - 1 - context), first, end)
        first, step = end, stride


class Row(NamedTuple):
    """inputs int32 [n] and the tokens that follow them, int32 [n] or [n, K], IGNORED where no score is wanted."""

    inputs: np.ndarray
    targets: np.ndarray


def row(ids: np.ndarray, window: Window) -> Row:
    """The row of a window of `ids`."""
    piece = np.asarray(ids[window.begin : window.end], np.int32)
    targets = piece[1:].copy()
    targets[: window.first - window.begin - 1] = IGNORED
    return Row(piece[:-1], targets)


class Seam(NamedTuple):
    """A context and its continuations as ids. `moved`: tokens of the context that went over to the continuations, because a token of the
    whole text spans the join."""

    context: list[int]
    continuations: list[list[int]]
    moved: int


def beginning(tokenizer: Any) -> int:
    """The token that a document comes after: what the tokenizer puts before every text, else the one between documents. Raises DataError
    where it has neither."""
    return tokenizer.eot_id if tokenizer.bos_id is None else tokenizer.bos_id


def seam(tokenizer: Any, context: str, continuations: Sequence[str], prefix: Sequence[int]) -> Seam:
    """Cut where all texts agree, so that no continuation is empty and all are scored after the same tokens.

    The whole text is encoded, as it would stand in a document; white space at the end of the context goes with the continuation. Where a
    token spans the join, what the context has of it is scored too, in every continuation alike. `prefix`: ids before the context.
    A continuation that the tokenizer leaves out of a text (a normalizer) gets the last token before it, so that none is without.
    Raises DataError for an empty continuation, and for a text without any token.
    """
    if "" in continuations:
        raise DataError("A continuation is empty.", "It has no token that could be scored.", "Leave it out, or write what it says.")
    head = context.rstrip()
    ids = tokenizer.encode(head)
    wholes = [tokenizer.encode(context + continuation) for continuation in continuations]
    if not all(wholes):
        raise DataError("A continuation has no token.", "The tokenizer leaves out what it says.", "Leave it out, or write what it says.")
    keep = min((min(_common(ids, whole), len(whole) - 1) for whole in wholes), default=len(ids))
    return Seam([*prefix, *ids[:keep]], [whole[keep:] for whole in wholes], len(ids) - keep)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


@dataclass(frozen=True)
class Likelihood:
    """Of a continuation: the log-probability of each token, whether each is the most probable one, and context tokens that were cut off."""

    logprobs: tuple[float, ...]
    greedy: bool
    cut: int = 0

    @property
    def logprob(self) -> float:
        """Of all of it, nats (not positive)."""
        return math.fsum(self.logprobs)

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        return len(self.logprobs)


class Scorer:
    """Scores with the parameters of a backend. context: the most tokens that are read at once. Each method gives its results in the
    order of what it is given. Raises NotFiniteError where the model gives no numbers.

    progress: called after each forward pass with how many tokens it scored.
    """

    def __init__(self, backend: Backend, params: dict[str, Any], context: int, batch_tokens: int | None = None):
        self.backend, self.params, self.context = backend, params, context
        self.batch_tokens = batch_tokens or BATCH_TOKENS["cpu" if backend.describe().kind == "cpu" else "gpu"]
        self.progress: Callable[[int], None] = lambda tokens: None

    def documents(self, documents: Sequence[np.ndarray], stride: int | None = None) -> list[np.ndarray]:
        """Log-probability of every token but the first, float32 [n - 1] of each document of n tokens."""
        found: list[list[np.ndarray]] = [[] for _ in documents]
        numbered = ((at, window) for at, ids in enumerate(documents) for window in windows(len(ids), self.context, stride))
        for lot in _batched(numbered, max(1, LOT * self.batch_tokens // self.context)):
            scores = self.rows(row(documents[at], window) for at, window in lot)
            for (at, window), scored in zip(lot, scores, strict=True):
                found[at].append(scored.logprobs[window.first - window.begin - 1 :])
        return [np.concatenate(parts) if parts else np.empty(0, np.float32) for parts in found]

    def continuations(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Likelihood]:
        """Of (context, continuation), ids, neither empty. Too long a pair loses the left of the context, never of the continuation.
        Continuations of one token after the same context share one row."""
        rows: dict[bytes, list[Row]] = {}
        places: list[list[tuple[bytes, int]]] = []
        cuts: list[int] = []
        for context, continuation in pairs:
            assert len(context), "there is nothing before the continuation"
            assert len(continuation), "there is nothing to score"
            ids = np.array([*context, *continuation], np.int32)
            own = []
            its = list(windows(len(ids), self.context, first=len(context)))
            for window in its:
                one = row(ids, window)
                key = one.inputs.tobytes()
                alike = rows.setdefault(key, [])
                own.append((key, len(alike)))
                alike.append(one)
            places.append(own)
            cuts.append(its[0].begin)
        merged = [Row(alike[0].inputs, np.stack([one.targets for one in alike], axis=-1)) for alike in rows.values()]
        scores = dict(zip(rows, zip(merged, self.rows(merged), strict=True), strict=True))
        return [_likelihood([(*scores[key], at) for key, at in own], cut) for own, cut in zip(places, cuts, strict=True)]

    def rows(self, rows: Iterable[Row], top: int = 0) -> list[Scores]:
        """The scores of rows, each of its own length and at most `context` long."""
        rows = list(rows)
        found: dict[int, Scores] = {}
        for numbers in self._batches(rows):
            batch = [rows[number] for number in numbers]
            scores = self.backend.score(self.params, *_padded(batch, self._shape(batch)), top=top)
            for place, number in enumerate(numbers):
                targets = rows[number].targets
                part = tuple(value[place, : len(targets)] for value in scores)
                choices = targets.shape[1:]
                part = [value[:, : choices[0]] for value in part] if choices else [value[:, 0] for value in part]
                found[number] = Scores(*part)
                _check(found[number])
            self.progress(sum(int((rows[number].targets != IGNORED).sum()) for number in numbers))
        return [found[number] for number in range(len(rows))]

    def _batches(self, rows: list[Row]) -> Iterator[list[int]]:
        """Numbers of rows of one padded length and one number of choices; the longest first, so that what does not fit fails at once."""

        def key(number: int) -> tuple[int, int]:
            targets = rows[number].targets
            return self._length(len(targets)), power_of_two(targets.shape[1]) if targets.ndim > 1 else 1

        order = sorted(range(len(rows)), key=lambda number: (key(number), len(rows[number].inputs)), reverse=True)
        for (length, _), numbers in itertools.groupby(order, key):
            count = max(1, power_of_two(self.batch_tokens // length + 1) // 2)
            yield from _batched(numbers, count)

    def _length(self, length: int) -> int:
        padded = max(LEAST, power_of_two(length))
        return self.context if length <= self.context < padded else padded

    def _shape(self, batch: list[Row]) -> tuple[int, int, int]:
        widest = max(row.targets.shape[1] if row.targets.ndim > 1 else 1 for row in batch)
        return power_of_two(len(batch)), self._length(max(len(row.inputs) for row in batch)), power_of_two(widest)


def _batched(items: Iterable[Item], count: int) -> Iterator[list[Item]]:
    items = iter(items)
    while batch := list(itertools.islice(items, count)):
        yield batch


def _padded(batch: list[Row], shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """inputs [B, T] and targets [B, T, K]; what is filled up counts for nothing, and no token sees what comes after it."""
    inputs, targets = np.zeros(shape[:2], np.int32), np.full(shape, IGNORED, np.int32)
    for place, one in enumerate(batch):
        wanted = one.targets.reshape(len(one.inputs), -1)
        inputs[place, : len(one.inputs)] = one.inputs
        targets[place, : len(one.inputs), : wanted.shape[1]] = wanted
    return inputs, targets


def _check(scores: Scores) -> None:
    if not np.isfinite(scores.logprobs).all():
        raise NotFiniteError(
            "The model gives a log-probability that is no number.",
            "Its weights are not finite, or its computation overflows.",
            "Take an earlier checkpoint, or --dtype float32.",
        )


def _likelihood(parts: list[tuple[Row, Scores, int]], cut: int) -> Likelihood:
    """Of the windows of one continuation: (merged row, its scores, which of its choices)."""
    logprobs, greedy = [], True
    for merged, scores, at in parts:
        counted = merged.targets[:, at] != IGNORED
        logprobs += scores.logprobs[counted, at].tolist()
        greedy &= bool(scores.greedy[counted, at].all())
    return Likelihood(tuple(logprobs), greedy, cut)
