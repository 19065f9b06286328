"""20 steps with a teacher, and the stored rows of them, as rows.py has those of models.

`python -m tests.conformance.distillation_rows` writes the rows of the backends that are installed anew.
"""

import dataclasses
import functools
import sys
from typing import NamedTuple

import tests.conftest  # settings first, also when this is run as a script
from smedjan_common.model.params import initial_params
from smedjan_common.reference.model import Teacher
from smedjan_common.training.distillation import Mixed
from smedjan_common.training.schedule import learning_rate
from tests.conformance import rows, subjects
from tests.conformance.cases import DEFAULT_CASES, Case, train_config

PATH = rows.FOLDER / "teacher" / "steps.json"
_CASE: Case = next(iter(DEFAULT_CASES.values()))
CASE = dataclasses.replace(_CASE, train=train_config(mask_documents=True, z_loss=1e-2, distill_temperature=2.0, distill_alpha=0.6))

assert tests.conftest


class Steps(NamedTuple):
    """A run and what its steps told."""

    run: subjects.Run
    told: list[dict[str, float]]


@functools.cache
def teacher() -> Teacher:
    """Of another width, with a head of its own, three of whose tokens mean nothing."""
    config = dataclasses.replace(CASE.model, dim=48, layers=1, heads=3, kv_heads=3, tied_head=False)
    params = {name: 4 * value if value.ndim > 1 else value for name, value in initial_params(config, 3).items()}
    return Teacher(config, params, Mixed(CASE.model.vocab_size - 3, 2.0, 0.6))


@functools.cache
def steps(backend: str, alpha: float = 0.6) -> Steps:
    """The run; once per session."""
    train, taught = dataclasses.replace(CASE.train, distill_alpha=alpha), teacher()
    side = subjects.make_backend(backend, CASE.model, train)
    side.learn_from(taught.config, taught.params, taught.mixed.known)
    state, told = side.init(CASE.start), []
    for step, batch in enumerate(CASE.batches):
        state, metrics = side.train_step(state, *batch, learning_rate(train, step), CASE.documents)
        told.append(side.read(metrics))
    return Steps(subjects.Run(*([row[key] for row in told] for key in ("loss", "grad_norm", "tokens")), side.save(state)), told)


def main() -> int:
    """Write the rows of the backends that are installed, keeping the others'."""
    return rows.write_losses(PATH, lambda backend: steps(backend).run.losses)


if __name__ == "__main__":
    sys.exit(main())
