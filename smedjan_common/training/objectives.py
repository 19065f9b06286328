"""What a step minimises, a row each. `lm` and `sft` have the cross-entropy of tokens as it is; other rows have a formula.

A formula reads the losses of tokens, nll = -log p, and gives a loss L of them and its derivatives w = dL / d nll. Both backends then
differentiate sum w nll with w held constant, whose gradient is that of L by the chain rule, in the fused head (smedjan_*/loss.py).
Formulas are written once, over any array module: NumPy's is the definition, in float64.

Shapes: B rows, T positions, M documents of a row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from smedjan_common.training.distillation import Distillation
from smedjan_common.training.preferences import METRICS, PREFERENCES, Loss, count_pairs, weigh

Array = Any  # of numpy, jax.numpy or mlx.core


class Rows(NamedTuple):
    """Rows of a batch, all of them or those of one part or device; no unit of an objective reaches over two rows.

    nll: float [B, T], nats, 0 where a target does not count. targets, documents: int [B, T], as batches have them; documents None: a row
    is one. reference: float [B, M], of pairs: what the reference gives to the documents, 0 where there is none; None of others.
    """

    nll: Array
    targets: Array
    documents: Array | None
    reference: Array | None


class Weighed(NamedTuple):
    """loss: summed over the units of the rows. weights: its derivatives by nll, [B, T]. metrics: what else is told, summed too."""

    loss: Array
    weights: Array
    metrics: dict[str, Array]


class Counts(NamedTuple):
    """What the means of a step are over, all its parts and devices together; at least 1 each."""

    tokens: Array
    units: Array


class Objective(NamedTuple):
    """An objective.

    command: the command that begins a run of it. unit: what the loss of a step is a mean over, all parts and devices together.
    formula(xp, rows, train) -> Weighed, by the array module xp and the TrainConfig; None: the cross-entropy of tokens.
    units(xp, targets, documents, reference) -> their number; None: the tokens that count. needs_reference: whether rows have a reference.
    metrics: names of what the formula tells. options: its class of options, which TrainConfig inherits.
    """

    name: str
    command: str
    unit: str = "tokens"
    formula: Callable[[Any, Rows, Any], Weighed] | None = None
    units: Callable[[Any, Array, Array | None, Array | None], Array] | None = None
    needs_reference: bool = False
    metrics: tuple[str, ...] = ()
    options: type | None = None


def _of_pairs(loss: Loss) -> Objective:
    """A loss of pairs of answers: documents 2j and 2j + 1 of a row."""

    def formula(xp: Any, rows: Rows, train: Any) -> Weighed:
        return Weighed(*weigh(xp, loss, *rows, train))

    def units(xp: Any, targets: Array, documents: Array | None, reference: Array | None) -> Array:
        assert reference is not None
        return count_pairs(xp, targets, documents, reference.shape[1])

    return Objective(loss.name, "dpo", "pairs", formula, units, loss.needs_reference, METRICS, loss.options)


OBJECTIVES: dict[str, Objective] = {
    row.name: row
    for row in (
        Objective("lm", "train", options=Distillation),
        Objective("sft", "sft", options=Distillation),  # targets are the tokens of answers: of what it is the loss, the data say
        *(_of_pairs(row) for row in PREFERENCES.values()),
    )
}
