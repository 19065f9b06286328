"""Choosing the next token, on the host in NumPy: a pure function of (logits, history, sampling, position).

    logit bias b           l + b for the tokens that are named
    repetition penalty r   l / r where l > 0, l * r where l < 0, for tokens of the history        (CTRL, Keskar et al., 2019)
    frequency penalty f    l - f n - p [n > 0], n: how often the token was generated (OpenAI); the prompt does not count
    presence penalty p
    temperature t          l / t; 0: the largest logit (greedy)
    top-k                  the k largest
    top-p                  the fewest most probable tokens whose probabilities sum to at least p  (Holtzman et al., 2020)
    min-p                  the tokens of at least m times the probability of the most probable    (Nguyen et al., 2024)
    draw                   argmax(l - log(-log u)), u uniform from Philox keyed by (seed, position)  (Gumbel-max)

They apply in this order, each to what the one before left. The noise of a position depends on nothing else, so both backends
write the same text at the same seed. Ties go to the smaller id.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np

from smedjan_common.errors import ConfigError, NotFiniteError

MAX_BIAS = 100.0  # of logit_bias either way: a ban, or the only choice
PENALTIES = (0.01, 100.0)  # the least and the most that `repetition_penalty` can be: no logit overflows
_REAL = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_KINDS: dict[str, type] = {"top_k": Integral, "seed": Integral} | dict.fromkeys(_REAL, Real)
_OFTEN_ENOUGH = 2048  # most probable tokens: of a trained model they have nearly all of the probability
_BLOCK = 4  # numbers that Philox makes at once
_SKIP = 700  # numbers that it makes in the time that one skip takes


@dataclass(frozen=True)
class Sampling:
    """How to choose. The defaults sample from the model's own distribution."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (id, what is added to its logit), each id once

    def validate(self) -> None:
        """Raises ConfigError for a value that makes no distribution, or no number of a logit."""
        for name, kind in _KINDS.items():
            if not isinstance(getattr(self, name), kind):
                what = f"--{name.replace('_', '-')} is {getattr(self, name)!r:.60}."
                raise ConfigError(what, f"It must be a {'whole ' if kind is Integral else ''}number.", "Leave it out for the default.")
        least, most = PENALTIES
        for name, ok, fix in (
            ("temperature", 0 <= self.temperature < np.inf, "Take 0 (greedy) or more."),
            ("top_k", self.top_k >= 0, "Take 0 (all) or more."),
            ("top_p", 0 < self.top_p <= 1, "Take a number over 0, up to 1 (all)."),
            ("min_p", 0 <= self.min_p <= 1, "Take 0 (all) to 1."),
            ("repetition_penalty", least <= self.repetition_penalty <= most, f"Take {least:g} to {most:g}: 1 (none), or 1.1, say."),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "Take -2 to 2: 0 (none), or 0.5, say."),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "Take -2 to 2: 0 (none), or 0.5, say."),
            ("seed", 0 <= self.seed < 1 << 64, "Take a whole number from 0 to 2**64 - 1."),
        ):
            if not ok:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}.", "That is out of range.", fix)
        for token, bias in self.logit_bias:
            if not isinstance(bias, Real) or not -MAX_BIAS <= bias <= MAX_BIAS:
                what = f"The logit_bias of token {token} is {bias}."
                raise ConfigError(what, "That is out of range.", f"Take {-MAX_BIAS:g} to {MAX_BIAS:g}.")


def sample(logits: np.ndarray, history: Sequence[int], sampling: Sampling, position: int, prompt_length: int | None = None) -> int:
    """The next token. logits: [V], of the model's own tokens only; history: every token before; position: its place in the text.

    prompt_length: how many of the history were given, not generated; None: all of them.

    Raises NotFiniteError for logits of which none, or not each, is a number (-inf is one: a token without a chance).
    """
    scores = np.asarray(logits, np.float64)
    if not np.isfinite(scores.max()):  # NaN is the largest of all
        raise NotFiniteError(
            f"The model gives {scores.max()} as the largest logit of token {position}.",
            "Its weights are not finite, or its computation overflows.",
            "Take an earlier checkpoint, or --dtype float32.",
        )
    if sampling.logit_bias:
        scores = biased(scores, sampling.logit_bias)
    if sampling.repetition_penalty != 1:
        scores = penalize(scores, history, sampling.repetition_penalty)
    if (sampling.presence_penalty or sampling.frequency_penalty) and prompt_length is not None:
        scores = discouraged(scores, history[prompt_length:], sampling.presence_penalty, sampling.frequency_penalty)
    if sampling.temperature == 0:
        return int(np.argmax(scores))
    scores = filtered(_divided(scores, sampling.temperature), sampling)
    kept = np.flatnonzero(scores > -np.inf)
    drawn = gumbel(kept, sampling.seed, position)
    drawn += scores if len(kept) == len(scores) else scores[kept]
    return int(kept[np.argmax(drawn)])


def filtered(scores: np.ndarray, sampling: Sampling) -> np.ndarray:
    """`scores` with -inf for the tokens that top-k, top-p and min-p leave out."""
    if 0 < sampling.top_k < len(scores):
        scores = top_k(scores, sampling.top_k)
    if sampling.top_p < 1:
        scores = top_p(scores, sampling.top_p)
    if sampling.min_p > 0:
        scores = min_p(scores, sampling.min_p)
    return scores


def biased(scores: np.ndarray, biases: Sequence[tuple[int, float]]) -> np.ndarray:
    """Scores with what each named token is given added."""
    result = scores.copy()
    for token, bias in biases:
        result[token] += bias
    return result


def discouraged(scores: np.ndarray, generated: Sequence[int], presence: float, frequency: float) -> np.ndarray:
    """Scores less `presence` for each token that was generated, and less `frequency` for each time that it was."""
    counts = np.bincount(np.asarray(generated, np.int64), minlength=len(scores))
    return scores - frequency * counts - presence * (counts > 0)


def penalize(scores: np.ndarray, history: Sequence[int], penalty: float) -> np.ndarray:
    """Scores with the tokens of `history` made less likely, each once however often it occurs."""
    seen = np.asarray(history, np.int64)
    seen = seen[seen < len(scores)]
    before = scores[seen]
    result = scores.copy()
    result[seen] = np.where(before > 0, before / penalty, before * penalty)  # the same value however often an id is there
    return result


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Keep exactly the `k` largest."""
    return _keep(scores, _largest(scores, k).min(), k)


def top_p(scores: np.ndarray, p: float) -> np.ndarray:
    """Keep the fewest most probable tokens whose probabilities sum to at least `p`."""
    total, possible = _weights(scores).sum(), scores[scores > -np.inf]
    for size in (_OFTEN_ENOUGH, len(scores)):
        descending = np.sort(_largest(possible, size))[::-1]  # equal scores are equally probable: their ids do not matter for the sums
        sums = np.cumsum(np.exp(descending - descending[0]) / total)
        if sums[-1] >= p:
            break
    count = 1 + int(np.searchsorted(sums[:-1], p))  # a token is kept where those before it do not reach p
    return _keep(scores, descending[count - 1], count)


def min_p(scores: np.ndarray, share: float) -> np.ndarray:
    """Keep the tokens of at least `share` times the largest probability."""
    return np.where(scores >= scores.max() + np.log(share), scores, -np.inf)


def probabilities(scores: np.ndarray) -> np.ndarray:
    """softmax."""
    weights = _weights(scores)
    return weights / weights.sum()


def gumbel(ids: np.ndarray, seed: int, position: int) -> np.ndarray:
    """Standard Gumbel noise of the tokens `ids` (ascending, at least one) at one position, float64. It depends on nothing but
    (seed, position, id): Philox's raw bits are the same in every NumPy."""
    bits = _bits(ids, seed, position)
    bits >>= np.uint64(11)
    noise = bits.astype(np.float64)
    noise += 0.5
    noise *= 2.0**-53  # uniform in (0, 1)
    for _ in range(2):
        np.negative(np.log(noise, out=noise), out=noise)
    return noise


def _bits(ids: np.ndarray, seed: int, position: int) -> np.ndarray:
    """The numbers `ids` of the stream of (seed, position), uint64. A few far apart are gone to one by one, others read on the way."""
    stream = np.random.Philox(key=np.array([seed, position], np.uint64))
    if len(ids) * _SKIP > ids[-1]:
        bits = stream.random_raw(int(ids[-1]) + 1)
        return bits if len(bits) == len(ids) else bits[ids]
    bits, at, numbers = [], 0, []
    for number in ids.tolist():
        block, within = divmod(number, _BLOCK)
        if block >= at:
            stream.advance(block - at)
            numbers, at = stream.random_raw(_BLOCK), block + 1
        bits.append(numbers[within])
    return np.array(bits)


def _weights(scores: np.ndarray) -> np.ndarray:
    return np.exp(scores - scores.max())


def _divided(scores: np.ndarray, temperature: float) -> np.ndarray:
    """l / t; where that overflows the largest is taken off before, so that only tokens without a chance become -inf."""
    with np.errstate(over="ignore"):
        divided = scores / temperature
        return divided if np.array_equal(np.isinf(divided), np.isinf(scores)) else (scores - scores.max()) / temperature


def _largest(scores: np.ndarray, count: int) -> np.ndarray:
    """The values of the `count` largest, in no order."""
    rest = max(len(scores) - count, 0)
    return np.partition(scores, rest)[rest:]


def _keep(scores: np.ndarray, least: float, count: int) -> np.ndarray:
    """`scores` with -inf for all but the `count` largest, of which `least` is the smallest: its ties with the smaller ids stay."""
    kept = scores >= least
    if (excess := int(np.count_nonzero(kept)) - count) > 0:
        kept[np.flatnonzero(scores == least)[-excess:]] = False
    return np.where(kept, scores, -np.inf)
