"""Loss on answers alone, in both backends: the mean over the trained tokens of the whole step, however it is cut into parts.

    L = sum over the step of -log p(x_t | x_<t) where t is trained  /  how many those are, at least 1

That is what TRL's SFTTrainer computes since transformers 4.46; a mean of the means of parts, as before, is another number.
"""

import dataclasses

import numpy as np
import pytest

from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.model.params import initial_params
from smedjan_common.reference import loss as reference_loss
from smedjan_common.reference import model as reference
from tests.conformance import subjects

MODEL = ModelConfig.build(vocab_size=64, dim=16, layers=1, heads=2, context_length=12, init_std=0.2)
TRAIN = TrainConfig(steps=1, batch_size=4, seq_len=12, lr=1e-2, clip_norm=0.0, weight_decay=0.0, dtype="float32", mask_documents=True)
TRAINED = ((3, 12), (9, 11), (0, 0), (5, 6))  # of each row: nothing of the third
LOSS = 4.324262


def batch():
    rng = np.random.default_rng(7)
    tokens = rng.integers(0, 64, (4, 13)).astype(np.int32)
    inputs, targets = tokens[:, :-1].copy(), tokens[:, 1:].copy()
    for row, (start, stop) in enumerate(TRAINED):
        targets[row, :start] = targets[row, stop:] = reference_loss.IGNORED
    documents = np.where(np.arange(12) < np.array([[0], [4], [6], [5]]), 0, 1).astype(np.int32)
    return inputs, targets, documents


def test_the_definition_gives_the_golden_loss():
    inputs, targets, documents = batch()
    logits = reference.forward(MODEL, initial_params(MODEL, 3), inputs, documents)
    rows = [reference_loss.mean_cross_entropy(logits[row : row + 1], targets[row : row + 1]) for row in (0, 1, 3)]
    assert reference_loss.mean_cross_entropy(logits, targets) == pytest.approx(LOSS, abs=1e-6)
    assert abs(np.mean(rows) - LOSS) > 0.01, "the mean of means is another number"


@pytest.mark.parametrize("name", subjects.BACKENDS)
def test_every_trained_token_of_a_step_weighs_the_same_however_it_is_cut(name):
    params, (inputs, targets, documents) = initial_params(MODEL, 3), batch()
    cut = [dataclasses.replace(TRAIN, grad_accum=parts) for parts in (1, 2, 4)]
    found = [subjects.loss_and_gradients(name, MODEL, train, params, (inputs, targets), documents) for train in cut]
    whole = np.sqrt(sum(np.sum(np.square(value)) for value in found[0][1].values()))
    for loss, gradients in found:
        assert loss == pytest.approx(LOSS, rel=1e-5)
        assert max(np.linalg.norm(gradients[key] - found[0][1][key]) for key in gradients) < 1e-5 * whole


@pytest.mark.parametrize("name", subjects.BACKENDS)
@pytest.mark.parametrize("parts", [1, 4])
def test_a_step_without_a_trained_token_is_a_loss_of_0_and_changes_nothing(name, parts):
    inputs, targets, documents = batch()
    side, start = subjects.make_backend(name, MODEL, dataclasses.replace(TRAIN, grad_accum=parts)), initial_params(MODEL, 3)
    state, metrics = side.train_step(side.init(start), inputs, np.full_like(targets, reference_loss.IGNORED), 1e-2, documents)
    values = side.read(metrics)
    assert (values["loss"], values["grad_norm"]) == (0.0, 0.0)
    assert all(np.array_equal(value, start[key]) for key, value in side.save(state).params.items())
