"""The outside: the chunked cross-entropy with its z-loss, and both its gradients, are those of torch's autograd in float64."""

from typing import Any

import numpy as np
import pytest

from tests.conformance import subjects
from tests.conformance.compare import Difference, demand, relative_l2
from tests.conformance.gates import FLOAT32

torch = pytest.importorskip("torch", reason="torch is not installed (extra: oracle)")

pytestmark = [pytest.mark.oracle, pytest.mark.xdist_group("oracle")]

BATCH, LENGTH, DIM, VOCAB = 3, 7, 24, 50


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the head reads, its weight, and targets of which some do not count; logits of size 5 make the softmax far from even."""
    rng = np.random.default_rng(5)
    hidden = rng.standard_normal((BATCH, LENGTH, DIM)).astype(np.float32)
    embed = rng.standard_normal((VOCAB, DIM)).astype(np.float32)
    targets = rng.integers(0, VOCAB, (BATCH, LENGTH), dtype=np.int32)
    targets[rng.random(targets.shape) < 0.3] = -1
    return hidden, embed, targets


def by_torch(z_loss: float) -> list[np.ndarray]:
    hidden, embed, targets = inputs()
    x, weight = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (hidden, embed))
    logits = (x @ weight.T).flatten(0, 1)
    aims = torch.tensor(targets).long().flatten()
    loss = torch.nn.functional.cross_entropy(logits, aims, ignore_index=-1, reduction="sum")
    objective = loss + z_loss * (torch.logsumexp(logits, -1)[aims >= 0] ** 2).sum()
    objective.backward()
    return [value.detach().numpy() for value in (objective, loss, x.grad, weight.grad)]


def by_backend(backend: str, z_loss: float) -> list[np.ndarray]:
    framework, cross_entropy = subjects.framework(backend), subjects.module(backend, "loss").cross_entropy
    hidden, embed, targets = (framework.array(value) for value in inputs())

    def gradient_by(position: int) -> Any:
        def objective(value: Any) -> Any:
            arguments = [hidden, embed]
            arguments[position] = value
            return cross_entropy(*arguments, targets, z_loss)[0]

        return framework.grad(objective)((hidden, embed)[position])

    return [np.asarray(value) for value in (*cross_entropy(hidden, embed, targets, z_loss), gradient_by(0), gradient_by(1))]


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("z_loss", [0.0, 1e-4, 0.1])
def test_loss_and_gradients_equal_torch(backend: str, z_loss: float, chunks: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(subjects.module(backend, "loss"), "loss_chunks", lambda tokens, vocab: chunks)
    names = ("objective", "loss", "gradient of what the head reads", "gradient of the head")
    sides = zip(names, by_backend(backend, z_loss), by_torch(z_loss), strict=True)
    demand(Difference(name, relative_l2(got, want), FLOAT32.one_op) for name, got, want in sides)


def test_the_evaluated_loss_is_the_loss_that_training_reports(backend: str):
    hidden, embed, targets = (subjects.framework(backend).array(value) for value in inputs())
    evaluated = np.asarray(subjects.module(backend, "loss").forward_loss(hidden, embed, targets))
    demand([Difference("loss", relative_l2(evaluated, by_torch(0.1)[1]), FLOAT32.one_op)])
