"""Losses of pairs in both backends: the first step is the definition's, 20 steps are the same in both, rows are those that are stored."""

import dataclasses
import json
import math

import numpy as np
import pytest

from smedjan_common.reference import model as reference
from smedjan_common.training.preferences import METRICS, PREFERENCES
from tests.conformance import checks, rows, subjects
from tests.conformance.compare import Difference, demand, relative_l2
from tests.conformance.gates import FLOAT32
from tests.conformance.preference_rows import CASE, DOCUMENTS, PATH, batch, reference_of, steps, train_of

pytestmark = pytest.mark.xdist_group("preferences")  # one worker compiles them


@pytest.mark.parametrize("name", PREFERENCES)
def test_the_first_step_has_the_loss_of_the_definition(backend: str, name: str):
    run = steps(backend, name)
    side = subjects.make_backend(backend, CASE.model, train_of(name))
    scores = reference_of(side, side.place(CASE.start), 0).astype(np.float64)
    wanted = reference.objective(CASE.model, train_of(name), CASE.start, *batch(0), DOCUMENTS, scores)
    demand([Difference("loss", abs(run.told[0]["loss"] / wanted - 1), FLOAT32.loss)])
    if PREFERENCES[name].needs_reference:
        assert run.told[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert name != "dpo" or run.told[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert run.told[-1]["rewards/chosen"] != run.told[0]["rewards/chosen"]


@pytest.mark.parametrize("name", PREFERENCES)
def test_twenty_steps_of_pairs_are_the_same_in_both_backends(both_backends, name: str):
    got, want = (steps(backend, name) for backend in both_backends)
    demand(checks.runs(got.run, want.run))
    for key in METRICS:
        one, other = (np.array([row[key] for row in run.told]) for run in (got, want))
        size = max(np.abs(other).max(), 0.01)  # margins begin at 0
        demand([Difference(key, float(np.abs(one - other).max() / size), FLOAT32.steps_params)])


@pytest.mark.parametrize("name", PREFERENCES)
def test_rows_of_pairs_are_those_that_are_stored(backend: str, name: str):
    stored = json.loads(PATH.read_text())[backend]
    losses = steps(backend, name).run.losses
    if stored["made_with"] == rows.made_with(backend):
        assert losses == stored["loss"][name]
    demand([Difference("stored row", max(abs(a / b - 1) for a, b in zip(losses, stored["loss"][name], strict=True)), FLOAT32.steps_loss)])


def test_parts_of_a_step_of_pairs_are_weighed_by_their_pairs(backend: str):
    """The rows have 2, 2, 1 and 1 pairs: means of parts would weigh the last two too much."""
    gradients, losses = [], []
    for parts in (1, 2):
        train = dataclasses.replace(train_of("dpo"), grad_accum=parts, beta1=0.0, clip_norm=0.0)
        side = subjects.make_backend(backend, CASE.model, train)
        scores = reference_of(side, side.place(CASE.start), 0) + np.linspace(-3, 3, 4, dtype=np.float32)
        state, metrics = side.train_step(side.init(CASE.start), *batch(0), 1e-3, DOCUMENTS, scores)
        moments = side.save(state).optimizer
        gradients.append(np.concatenate([moments[f"mu.{key}"].ravel() for key in CASE.start]))
        losses.append(side.read(metrics)["loss"])
    demand([Difference("gradient", relative_l2(*gradients), FLOAT32.same_arithmetic)])
    demand([Difference("loss", abs(losses[0] / losses[1] - 1), FLOAT32.same_arithmetic)])
