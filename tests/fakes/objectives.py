"""An objective of pairs of documents for tests: weights of both signs, metrics, a reference, units that are not tokens."""

from typing import Any

from smedjan_common.config import TrainConfig
from smedjan_common.training.objectives import Array, Objective, Rows, Weighed

BETA = 0.4


def train(objective: str = "lm", **changes: Any) -> TrainConfig:
    """A configuration that formulas can be called with."""
    known = objective if objective != PAIRED.name else "lm"
    return TrainConfig(**{"steps": 3, "lr": 1e-2, "batch_size": 4, "seq_len": 12, "objective": known, **changes})


def paired(xp: Any, rows: Rows, config: TrainConfig) -> Weighed:
    """softplus(-BETA d) of every pair of documents 2i, 2i + 1 of a row, d = (s - s_ref) of the first - that of the second."""
    assert rows.documents is not None
    assert rows.reference is not None
    count = rows.reference.shape[1] // 2
    loss = margins = 0.0
    weights = rows.nll * 0.0
    for pair in range(count):
        first, second = (xp.where(rows.documents == 2 * pair + side, 1.0, 0.0) for side in range(2))
        exists = xp.where((second * (rows.targets >= 0)).sum(1) > 0, 1.0, 0.0)
        d_B = -((first - second) * rows.nll).sum(1) - (rows.reference[:, 2 * pair] - rows.reference[:, 2 * pair + 1])
        loss = loss + (exists * xp.logaddexp(xp.zeros_like(d_B), -BETA * d_B)).sum()
        slope_B = exists * BETA / (1 + xp.exp(BETA * d_B))
        weights = weights + xp.where(rows.targets >= 0, slope_B[:, None] * (first - second), 0.0)
        margins = margins + (exists * d_B).sum()
    return Weighed(loss, weights, {"margin": margins})


def pairs(xp: Any, targets: Array, documents: Array | None, reference: Array | None) -> Array:
    """How many pairs there are: second documents with a token that counts."""
    assert documents is not None
    odd = (xp.arange(1, 5, 2)[None, None, :] == documents[..., None]) & (targets >= 0)[..., None]
    return odd.any(axis=1).sum()


PAIRED = Objective("paired", "dpo", "pairs", paired, pairs, needs_reference=True, metrics=("margin",))
