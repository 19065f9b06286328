"""Blocks of tokens that a device draws by itself, and how it and the host come to the same tokens.

A device computes in float32 what smedjan_common.inference.sampling computes in float64 on the host: scores, noise, probabilities. It
takes a token only where the difference cannot matter, and gives all others to the host, with their logits:

    greedy                     the largest logit is the largest in either; with a repetition penalty by more than SCORE of its size
    a draw                     the best of score + noise, by more than KEY * (64 + both sizes)
    in the top k               in order of the scores, which is the same in either; with a repetition penalty for any order of what lies
                               within SCORE of its size
    in the top p, at least m   by more than MASS of all probability; by more than KEY * (16 + both sizes) of the scores

The best of all tokens may be one that a filter leaves out. Then so are all that are less probable, and the best of the rest is next:
one of the first TRIES of them is nearly always inside.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from smedjan_common.inference.sampling import Sampling

# 16 units of the last place of float32; a few are lost in the noise (in a draw of a million, 2^-19 at most) and in the scores
SCORE = KEY = 2.0**-20
MASS = 2.0**-12  # sums over a vocabulary, in whatever order
TRIES = 8
STOPS = 8  # ids that end a row, at most
COOLEST = 0.01  # the least temperature but 0: no score overflows


@dataclass(frozen=True)
class Draw:
    """What a row does in a block: it consumes `token`, draws, consumes what it drew, and so on, until it draws one of `stop_ids`, or `most`
    tokens. history: every token of the text so far, `token` last; the next one's place is its length."""

    row: int
    token: int
    history: Sequence[int]
    sampling: Sampling
    most: int
    stop_ids: frozenset[int] = frozenset()


class Drawn(NamedTuple):
    """What a row drew. The last token was not consumed yet; but where `logits` are given all were, and the host chooses the next one."""

    tokens: list[int]
    logits: np.ndarray | None


class Way(NamedTuple):
    """What a block computes besides logits: one compilation each."""

    random: bool  # noise, where a row is not greedy
    penalized: bool  # repetition penalty
    filtered: bool  # top-k, top-p, min-p
    renormalized: bool  # top-p of what top-k left


class Settings(NamedTuple):
    """How each row draws, arrays of R rows, the host's or the device's; those of rows that do not are never looked at."""

    seed: Any  # uint32 [R, 2], low half first
    greedy: Any  # bool
    temperature: Any  # float32
    top_k: Any  # int32
    top_p: Any  # float32, 2 for all
    min_p: Any  # float32, its logarithm, or -inf
    penalty: Any  # float32
    stops: Any  # int32 [R, STOPS], filled up with -1


def on_device(sampling: Sampling, stop_ids: frozenset[int] = frozenset()) -> bool:
    """Whether a device draws like this."""
    plain = not sampling.logit_bias and not sampling.presence_penalty and not sampling.frequency_penalty
    return plain and (sampling.temperature == 0 or sampling.temperature >= COOLEST) and len(stop_ids) <= STOPS


def way(draws: Sequence[Draw], vocab_size: int) -> Way:
    """What a block of these rows computes."""
    drawn = [draw.sampling for draw in draws if not _greedy(draw.sampling)]
    of_k = [0 < each.top_k < vocab_size for each in drawn]
    return Way(
        bool(drawn),
        any(draw.sampling.repetition_penalty != 1 for draw in draws),
        any(of_k) or any(each.top_p < 1 or each.min_p > 0 for each in drawn),
        any(k and each.top_p < 1 for k, each in zip(of_k, drawn, strict=True)),
    )


def settings(draws: Sequence[Draw], rows: int, vocab_size: int) -> Settings:
    """Their arrays."""
    made = Settings(
        np.zeros((rows, 2), np.uint32),
        np.ones(rows, bool),
        np.ones(rows, np.float32),
        np.full(rows, vocab_size, np.int32),
        np.full(rows, 2, np.float32),
        np.full(rows, -np.inf, np.float32),
        np.ones(rows, np.float32),
        np.full((rows, STOPS), -1, np.int32),
    )
    for draw in draws:
        at, how = draw.row, draw.sampling
        made.seed[at] = how.seed & 0xFFFFFFFF, how.seed >> 32
        made.greedy[at], made.penalty[at] = _greedy(how), how.repetition_penalty
        made.temperature[at] = how.temperature or 1
        made.top_k[at] = min(how.top_k or vocab_size, vocab_size)
        made.top_p[at] = how.top_p if how.top_p < 1 else 2
        made.min_p[at] = np.log(how.min_p) if how.min_p else -np.inf
        made.stops[at, : len(draw.stop_ids)] = sorted(draw.stop_ids)
    return made


def seen(draws: Sequence[Draw], rows: int, vocab_size: int) -> np.ndarray:
    """Which tokens each row's text has, bool [R, V]."""
    made = np.zeros((rows, vocab_size), bool)
    for draw in draws:
        ids = np.asarray(draw.history, np.int64)
        made[draw.row, ids[ids < vocab_size]] = True
    return made


def _greedy(sampling: Sampling) -> bool:
    """The first of one is the largest, whatever its noise."""
    return sampling.temperature == 0 or sampling.top_k == 1
