"""20 steps of every loss of pairs from a policy that begins as its reference, and the stored rows of them, as rows.py has those of models.

`python -m tests.conformance.preference_rows` writes the rows of the backends that are installed anew.
"""

import functools
import sys
from typing import Any, NamedTuple

import numpy as np

import tests.conftest  # settings first, also when this is run as a script
from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.training.preferences import PREFERENCES, document_sums
from smedjan_common.training.schedule import learning_rate
from tests.conformance import rows, subjects
from tests.conformance.cases import BATCH, DEFAULT_CASES, LENGTH, STEPS, Case, train_config

CASE: Case = next(iter(DEFAULT_CASES.values()))
DOCUMENTS = np.stack([np.repeat(np.arange(5), sizes) for sizes in ((5, 4, 3, 4, 1), (3, 6, 4, 4, 0), (8, 9, 0, 0, 0), (6, 5, 0, 0, 6))])
MOST = 4  # documents of the fullest row; what is beyond them is none
PATH = rows.FOLDER / "pairs" / "steps.json"
OPTIONS: dict[str, dict[str, Any]] = {"dpo": {"label_smoothing": 0.1}, "ipo": {"nll_weight": 0.2}, "simpo": {"gamma": 0.5}, "orpo": {}}

assert tests.conftest
assert DOCUMENTS.shape == (BATCH, LENGTH)


class Steps(NamedTuple):
    """A run and what its steps told beside the loss."""

    run: subjects.Run
    told: list[dict[str, float]]


def train_of(name: str, **changes: Any) -> TrainConfig:
    """How a loss is trained: by its own defaults, but for what nothing else here would try."""
    row = PREFERENCES[name]
    values = {"objective": name, "beta": row.beta, "nll_weight": row.nll_weight, **OPTIONS[name], **changes}
    return train_config(mask_documents=True, packing="documents", **values)


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, targets) of a step: the first token of an answer is its question, and no target is of the next answer."""
    rng = np.random.default_rng((3, step))
    tokens = rng.integers(0, CASE.model.vocab_size, (BATCH, LENGTH + 1), dtype=np.int32)
    targets = tokens[:, 1:].copy()
    begins = np.diff(DOCUMENTS, prepend=-1, axis=1) != 0
    targets[begins | np.roll(begins, -1, 1) | (DOCUMENTS >= MOST)] = -1
    return tokens[:, :-1].copy(), targets


def reference_of(side: Any, params: Any, step: int) -> np.ndarray:
    """What a backend gives to the answers of a step, float32 [BATCH, MOST]."""
    return -document_sums(np, side.token_losses(params, *batch(step), DOCUMENTS), DOCUMENTS, MOST)


@functools.cache
def steps(backend: str, name: str) -> Steps:
    """The run of a loss; once per session."""
    model: ModelConfig = CASE.model
    train = train_of(name)
    side = subjects.make_backend(backend, model, train)
    state, placed = side.init(CASE.start), side.place(CASE.start)
    told = []
    for step in range(STEPS):
        arrays = (*batch(step), learning_rate(train, step), DOCUMENTS, reference_of(side, placed, step))
        state, metrics = side.train_step(state, *arrays)
        told.append(side.read(metrics))
    return Steps(subjects.Run(*([row[key] for row in told] for key in ("loss", "grad_norm", "tokens")), side.save(state)), told)


def main() -> int:
    """Write the rows of the backends that are installed, keeping the others'."""
    return rows.write_losses(PATH, lambda backend: {name: steps(backend, name).run.losses for name in PREFERENCES})


if __name__ == "__main__":
    sys.exit(main())
