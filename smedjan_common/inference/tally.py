"""Sums over documents and what they come to: loss, perplexity, bits per byte, with the standard error over documents.

    loss = nats / tokens       perplexity = e^loss       word perplexity = e^(nats / words)       bits per byte = nats / ln 2 / bytes

Bytes are those of the raw text, each once. The end-of-text token after a document stands for no byte and is kept apart, so each figure can
be had with it and without.

A ratio of sums r = sum x / sum y over n documents has the standard error sqrt(n / (n - 1) sum (x - r y)^2) / sum y (Cochran, Sampling
Techniques, 1977, 6.4).
"""

import math
from dataclasses import dataclass, field

import numpy as np

PAIRS = ("tokens", "bytes")  # what nats are divided by where a standard error is told


@dataclass
class Tally:
    """Sums. nats, tokens: of the text alone. end_nats: of `ends` end-of-text tokens."""

    documents: int = 0
    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    words: int = 0
    end_nats: float = 0.0
    ends: int = 0
    _squares: dict[str, np.ndarray] = field(default_factory=lambda: {name: np.zeros(3) for name in PAIRS})

    def add(self, logprobs: np.ndarray, num_bytes: int, words: int, end: float | None = None) -> None:
        """A document: log-probabilities of its tokens [n], UTF-8 bytes, words, log-probability of the end-of-text token after it."""
        nats = -float(logprobs.sum(dtype=np.float64))
        self.documents += 1
        self.nats += nats
        self.tokens += len(logprobs)
        self.bytes += num_bytes
        self.words += words
        if end is not None:
            self.end_nats -= end
            self.ends += 1
        for name, size in zip(PAIRS, (len(logprobs), num_bytes), strict=True):
            self._squares[name] += (nats * nats, nats * size, float(size) * size)

    @property
    def loss(self) -> float | None:
        """Nats per token of text. None where there is none; so are all figures."""
        return _ratio(self.nats, self.tokens)

    @property
    def loss_with_ends(self) -> float | None:
        """Nats per token, the end-of-text tokens counted."""
        return _ratio(self.nats + self.end_nats, self.tokens + self.ends)

    @property
    def perplexity(self) -> float | None:
        """Per token of text."""
        return _exp(self.loss)

    @property
    def word_perplexity(self) -> float | None:
        """Per word between white space."""
        return _exp(_ratio(self.nats, self.words))

    @property
    def bits_per_byte(self) -> float | None:
        """Of the text alone."""
        return _ratio(self.nats / math.log(2), self.bytes)

    @property
    def bits_per_byte_with_ends(self) -> float | None:
        """The nats of the end-of-text tokens counted, which add no byte."""
        return _ratio((self.nats + self.end_nats) / math.log(2), self.bytes)

    @property
    def loss_error(self) -> float | None:
        """Standard error of `loss` over documents."""
        return self._error("tokens", self.tokens)

    @property
    def bits_per_byte_error(self) -> float | None:
        """Standard error of `bits_per_byte` over documents."""
        error = self._error("bytes", self.bytes)
        return None if error is None else error / math.log(2)

    def _error(self, name: str, total: int) -> float | None:
        if self.documents < 2 or not total:
            return None
        ratio, (xx, xy, yy) = self.nats / total, self._squares[name].tolist()
        spread = max(xx - 2 * ratio * xy + ratio * ratio * yy, 0.0)
        return math.sqrt(spread * self.documents / (self.documents - 1)) / total


def _ratio(value: float, by: float) -> float | None:
    return value / by if by else None


def _exp(value: float | None) -> float | None:
    """None too where a float does not hold it."""
    return None if value is None or value > 700 else math.exp(value)
