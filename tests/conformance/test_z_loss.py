"""The z-loss changes what is minimised, and nothing of what is reported."""

import dataclasses

import pytest

from smedjan_common.reference import model as reference
from smedjan_common.reference.loss import mean_z_loss
from tests.conformance import checks, subjects
from tests.conformance.cases import DEFAULT_CASES, Case, train_config
from tests.conformance.compare import Difference, Mismatch, demand, tensors
from tests.conformance.gates import FLOAT32

Z_LOSS = 0.05  # far more than a run takes, so that it is a large part of every gradient


@pytest.fixture
def penalised() -> Case:
    return dataclasses.replace(next(iter(DEFAULT_CASES.values())), train=train_config(z_loss=Z_LOSS))


def test_every_gradient_is_the_slope_of_the_objective(backend: str, penalised: Case):
    demand(checks.gradient(backend, penalised))


def test_the_weight_of_the_z_loss_is_seen_by_the_gradient(backend: str, penalised: Case, monkeypatch: pytest.MonkeyPatch):
    plain = reference.objective
    monkeypatch.setattr(
        reference, "objective", lambda config, train, *rest: plain(config, dataclasses.replace(train, z_loss=train.z_loss * 1.001), *rest)
    )
    with pytest.raises(Mismatch, match="gradient"):
        demand(checks.gradient(backend, penalised))


def test_the_reported_loss_is_the_cross_entropy_alone(backend: str, penalised: Case):
    demand(checks.loss(backend, penalised))
    logits, (_, targets) = reference.forward(penalised.model, penalised.params, penalised.tokens), penalised.batches[0]
    assert Z_LOSS * mean_z_loss(logits, targets) > 0.1, "the z-loss should be no small part"


def test_parts_of_a_step_and_chunks_of_the_loss_change_nothing(backend: str, penalised: Case, monkeypatch: pytest.MonkeyPatch):
    demand(checks.same_step(backend, penalised, grad_accum=2))
    whole_loss, whole = subjects.loss_and_gradients(backend, penalised.model, penalised.train, penalised.params, penalised.batches[0])
    monkeypatch.setattr(subjects.module(backend, "loss"), "loss_chunks", lambda tokens, vocab: 5)
    config = dataclasses.replace(penalised.train, seed=5)  # another configuration, so nothing compiled before is used
    part_loss, part = subjects.loss_and_gradients(backend, penalised.model, config, penalised.params, penalised.batches[0])
    demand([Difference("loss", abs(part_loss / whole_loss - 1), FLOAT32.same_arithmetic), *tensors(part, whole, FLOAT32.one_op)])
