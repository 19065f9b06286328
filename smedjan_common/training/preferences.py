"""Losses of pairs of answers, of which one is better: a row of PREFERENCES for each, written once for NumPy, jax.numpy and mlx.core.

With s the sum of log p over the trained tokens of an answer, n their number, r = s - s_ref against the reference, w the better answer,
l the worse one, sp(x) = log(1 + e^x):

    dpo     (1 - ε) sp(-β d) + ε sp(β d),   d = r_w - r_l         Rafailov et al., 2023; ε > 0: conservative DPO, Mitchell, 2023
    ipo     (r_w / n_w - r_l / n_l - 1 / (2 β))^2                 Azar et al., 2023, by token as TRL has it
    simpo   sp(-(β (s_w / n_w - s_l / n_l) - γ))                  Meng et al., 2024: no reference
    orpo    β sp(-(o_w - o_l)) - s_w / n_w,   o = a - log(1 - e^a), a = s / n       Hong et al., 2024: no reference

and to each, --nll-weight α times -s_w / n_w (Pang et al., 2024); orpo has α = 1 of itself. The loss of a step is the mean over its pairs.

A loss L of log-probabilities of tokens has the gradient sum over t of w_t d(nll_t), with w_t = dL / d(nll_t) held constant: what is given
here beside each loss, and what the head is told (training.objectives). Those of the worse answer are negative.

Shapes: B rows, T positions, M documents of a row; pair j of a row is its documents 2j, the better answer, and 2j + 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from smedjan_common.model.options import option

Array = Any  # of the framework `xp`: numpy, jax.numpy or mlx.core
_SURE = -1e-7  # the largest log-probability of a token of which log(1 - p) is taken


@dataclass(frozen=True)
class Preference:
    """Options of every loss of pairs."""

    beta: float = option(
        0.1, "How much the answers' difference counts; for orpo the weight of its odds.", over=0, unset=None, filled="0.1; simpo: 2"
    )
    nll_weight: float = option(
        0.0,
        "Add this times the loss of the better answer by token, which keeps it probable.",
        least=0,
        unset=None,
        filled="0; orpo: 1",
    )


@dataclass(frozen=True)
class Smoothed(Preference):
    """Options of dpo."""

    label_smoothing: float = option(0.0, "sigmoid: the part of the pairs that may be the wrong way round.", least=0, under=0.5)


@dataclass(frozen=True)
class Margin(Preference):
    """Options of simpo."""

    gamma: float = option(1.0, "simpo: by how much the reward of the better answer is to be ahead.", least=0)


class Side(NamedTuple):
    """One answer of each pair, [B, M / 2]: sum of log p over its tokens, how many, and the sum that the reference gives them."""

    logp: Array
    tokens: Array
    reference: Array

    @property
    def mean(self) -> Array:
        """log p by token."""
        return self.logp / self.tokens

    @property
    def ratio(self) -> Array:
        """log p against the reference."""
        return self.logp - self.reference


class Judged(NamedTuple):
    """Of each pair: the loss, its derivatives by the log p of both answers, and what each answer is worth."""

    loss: Array
    by_chosen: Array
    by_rejected: Array
    reward_chosen: Array
    reward_rejected: Array


class Loss(NamedTuple):
    """A row. name: that of the objective; flag: that of --loss; beta, nll_weight: the defaults."""

    name: str
    flag: str
    about: str
    judge: Callable[[Any, Side, Side, Any], Judged]
    options: type
    needs_reference: bool
    beta: float = 0.1
    nll_weight: float = 0.0


METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "logps/chosen_per_token",
)


def count_pairs(xp: Any, targets: Array, documents: Array, most: int) -> Array:
    """How many pairs of a batch have tokens of both answers."""
    tokens = document_sums(xp, xp.where(targets >= 0, 1.0, 0.0), documents, most)
    return xp.sum(xp.where((tokens[:, 0::2] > 0) & (tokens[:, 1::2] > 0), 1.0, 0.0))


def weigh(xp: Any, loss: Loss, nll: Array, targets: Array, documents: Array, reference: Array, train: Any) -> tuple[Array, Array, dict]:
    """(loss, d loss / d nll [B, T], metrics): sums over the pairs of these rows. nll [B, T], 0 where a target does not count; reference
    [B, M]; train: the options of the loss."""
    most = reference.shape[1]
    sums, tokens = (
        document_sums(xp, nll, documents, most),
        document_sums(xp, xp.where(targets >= 0, 1.0, 0.0).astype(nll.dtype), documents, most),
    )
    there = (tokens[:, 0::2] > 0) & (tokens[:, 1::2] > 0)
    chosen, rejected = (Side(-sums[:, at::2], xp.maximum(tokens[:, at::2], 1), reference[:, at::2]) for at in (0, 1))
    judged = with_nll(loss.judge(xp, chosen, rejected, train), chosen, train.nll_weight)

    def of_pairs(values: Array) -> Array:
        return xp.where(there, values, 0.0)

    slopes = xp.stack([-of_pairs(judged.by_chosen), -of_pairs(judged.by_rejected)], -1).reshape(*reference.shape)
    weights = xp.where(targets >= 0, _spread(xp, slopes, documents), 0.0)
    ahead = xp.where(judged.reward_chosen > judged.reward_rejected, 1.0, 0.0)
    figures = (judged.reward_chosen, judged.reward_rejected, judged.reward_chosen - judged.reward_rejected, ahead)
    figures = (*figures, chosen.logp, rejected.logp, chosen.mean)
    metrics = {name: xp.sum(of_pairs(values)) for name, values in zip(METRICS, figures, strict=True)}
    return xp.sum(of_pairs(judged.loss)), weights, metrics


def document_sums(xp: Any, values: Array, documents: Array, most: int) -> Array:
    """Sums over the documents of each row, [B, T] -> [B, M]."""
    return xp.sum(xp.where(_hits(xp, documents, most), values[:, :, None], 0.0), 1)


def with_nll(judged: Judged, chosen: Side, weight: Any) -> Judged:
    """The loss and `weight` times that of the better answer by token."""
    return judged._replace(loss=judged.loss - weight * chosen.mean, by_chosen=judged.by_chosen - weight / chosen.tokens)


def _spread(xp: Any, values: Array, documents: Array) -> Array:
    """Of each position that of its document, [B, M] -> [B, T]."""
    return xp.sum(xp.where(_hits(xp, documents, values.shape[1]), values[:, None, :], 0.0), 2)


def _hits(xp: Any, documents: Array, most: int) -> Array:
    return documents[:, :, None] == xp.arange(most)[None, None, :]


def _softplus(xp: Any, x: Array) -> Array:
    return xp.maximum(x, 0) + xp.log1p(xp.exp(-xp.abs(x)))


def _sigmoid(xp: Any, x: Array) -> Array:
    small = xp.exp(-xp.abs(x))
    return xp.where(x >= 0, 1.0, small) / (1 + small)


def _dpo(xp: Any, chosen: Side, rejected: Side, train: Any) -> Judged:
    beta, wrong = train.beta, train.label_smoothing
    lead = beta * (chosen.ratio - rejected.ratio)
    loss = (1 - wrong) * _softplus(xp, -lead) + wrong * _softplus(xp, lead)
    slope = beta * (wrong * _sigmoid(xp, lead) - (1 - wrong) * _sigmoid(xp, -lead))
    return Judged(loss, slope, -slope, beta * chosen.ratio, beta * rejected.ratio)


def _ipo(xp: Any, chosen: Side, rejected: Side, train: Any) -> Judged:
    beta = train.beta
    over = chosen.ratio / chosen.tokens - rejected.ratio / rejected.tokens - 1 / (2 * beta)
    return Judged(over * over, 2 * over / chosen.tokens, -2 * over / rejected.tokens, beta * chosen.ratio, beta * rejected.ratio)


def _simpo(xp: Any, chosen: Side, rejected: Side, train: Any) -> Judged:
    beta = train.beta
    lead = beta * (chosen.mean - rejected.mean) - train.gamma
    slope = -beta * _sigmoid(xp, -lead)
    return Judged(_softplus(xp, -lead), slope / chosen.tokens, -slope / rejected.tokens, beta * chosen.mean, beta * rejected.mean)


def _orpo(xp: Any, chosen: Side, rejected: Side, train: Any) -> Judged:
    beta = train.beta
    better, worse = (xp.minimum(side.mean, _SURE) for side in (chosen, rejected))
    lead = (better - xp.log(-xp.expm1(better))) - (worse - xp.log(-xp.expm1(worse)))
    slope = -beta * _sigmoid(xp, -lead)
    by_chosen, by_rejected = slope / -xp.expm1(better) / chosen.tokens, -slope / -xp.expm1(worse) / rejected.tokens
    return Judged(beta * _softplus(xp, -lead), by_chosen, by_rejected, beta * chosen.mean, beta * rejected.mean)


PREFERENCES = {
    row.name: row
    for row in (
        Loss("dpo", "sigmoid", "DPO", _dpo, Smoothed, True),
        Loss("ipo", "ipo", "IPO", _ipo, Preference, True),
        Loss("simpo", "simpo", "SimPO", _simpo, Margin, False, beta=2.0),
        Loss("orpo", "orpo", "ORPO", _orpo, Preference, False, nll_weight=1.0),
    )
}
LOSSES = {row.flag: row for row in PREFERENCES.values()}
