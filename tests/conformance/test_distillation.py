"""A student and its teacher: the loss of the definition and its gradients, by the head alone and by whole steps."""

import dataclasses
import functools
import json
from typing import Any

import numpy as np
import pytest

from smedjan_common.config import ModelConfig
from smedjan_common.errors import CheckpointError
from smedjan_common.reference import loss as reference_loss
from smedjan_common.reference import model as reference
from smedjan_common.reference.derivative import directional_derivative
from smedjan_common.training.distillation import METRICS, Mixed
from tests.conformance import checks, rows, subjects
from tests.conformance.cases import Case
from tests.conformance.compare import Difference, demand, relative_l2
from tests.conformance.distillation_rows import CASE, PATH, steps, teacher
from tests.conformance.gates import FLOAT32

BATCH, LENGTH, DIM, WIDTH, VOCAB = 3, 7, 24, 40, 50
MIXED = [Mixed(VOCAB, 1.0, 0.5), Mixed(41, 2.5, 0.7), Mixed(41, 4.0, 1.0)]


def given() -> list[np.ndarray]:
    """What the student's head reads and its weight, targets of which some do not count, the same of the teacher."""
    rng = np.random.default_rng(5)
    targets = rng.integers(0, VOCAB, (BATCH, LENGTH), dtype=np.int32)
    targets[rng.random(targets.shape) < 0.3] = -1
    shapes = (BATCH, LENGTH, DIM), (VOCAB, DIM), (BATCH, LENGTH, WIDTH), (VOCAB, WIDTH)
    hidden, embed, taught, head = (0.5 * rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    return [hidden, embed, targets, taught, head]


def of_head(backend: str, mixed: Mixed, z_loss: float, arrays: list[np.ndarray], frozen: bool = False) -> list[np.ndarray]:
    """Objective, CE, KL and the gradients by what the student's head reads and by its weight, compiled as in a step."""
    framework, module = subjects.framework(backend), subjects.module(backend, "distillation")
    hidden, embed, targets, taught, head = map(framework.array, arrays)

    def both(pair: dict[str, Any]) -> Any:
        objective, *told = module.distilled_cross_entropy(pair["x"], pair["E"], targets, module.Taught(taught, head), mixed, z_loss, frozen)
        return objective, told

    (objective, told), gradients = framework.compile(_values_and_gradients(backend, both))({"x": hidden, "E": embed})
    return [np.asarray(value) for value in (objective, *told, gradients["x"], gradients["E"])]


def _values_and_gradients(backend: str, function: Any) -> Any:
    if backend == "mlx":
        import mlx.core as mx

        return mx.value_and_grad(function)
    import jax

    return jax.value_and_grad(function, has_aux=True)


def by_definition(mixed: Mixed, z_loss: float, hidden, embed, targets, taught, head) -> list[float]:
    """Objective, CE and KL, sums over the counted tokens."""
    logits, others = hidden @ embed.T, taught.astype(np.float64) @ head.astype(np.float64).T
    count = (targets >= 0).sum()
    ce = reference_loss.mean_cross_entropy(logits, targets)
    kl = reference_loss.mean_kl(others, logits, targets, mixed.known, mixed.temperature)
    total = mixed.loss(ce, kl) + z_loss * reference_loss.mean_z_loss(logits, targets)
    return [count * total, count * ce, count * kl]


def test_the_definition_is_the_divergence_of_two_distributions():
    """By sums of probabilities, one token after the other."""
    hidden, embed, targets, taught, head = given()
    mixed = MIXED[1]
    total, (p, q) = (
        0.0,
        (np.exp((x.astype(np.float64) @ w.T)[..., : mixed.known] / mixed.temperature) for x, w in ((taught, head), (hidden, embed))),
    )
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    for place in zip(*np.nonzero(targets >= 0), strict=True):
        total += sum(p[place][k] * np.log(p[place][k] / q[place][k]) for k in range(mixed.known))
    assert by_definition(mixed, 0.0, hidden.astype(np.float64), embed, targets, taught, head)[2] == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("mixed", MIXED, ids=str)
@pytest.mark.parametrize(("z_loss", "chunks"), [(0.1, 4), (0.0, 1)])
def test_loss_and_gradients_are_those_of_the_definition(backend: str, mixed, z_loss, chunks, monkeypatch: pytest.MonkeyPatch):
    where = subjects.module(backend, "distillation" if backend == "jax" else "loss")
    monkeypatch.setattr(where, "loss_chunks", lambda tokens, vocab: chunks)
    hidden, embed, *others = given()
    *values, by_hidden, by_embed = of_head(backend, mixed, z_loss, [hidden, embed, *others])
    wide = {"x": hidden.astype(np.float64), "E": embed.astype(np.float64)}
    expected = by_definition(mixed, z_loss, *wide.values(), *others)
    demand(Difference(f"value {i}", abs(float(a) / b - 1), FLOAT32.one_op) for i, (a, b) in enumerate(zip(values, expected, strict=True)))
    for name, gradient in (("x", by_hidden), ("E", by_embed)):
        direction = np.random.default_rng(1).standard_normal(gradient.shape)
        slope = directional_derivative(lambda at: by_definition(mixed, z_loss, at["x"], at["E"], *others)[0], wide, name, direction)
        error = abs(float((gradient * direction).sum(dtype=np.float64)) - slope) / float(np.linalg.norm(gradient))
        demand([Difference(f"slope by {name}", error, FLOAT32.loss)])
    assert not by_hidden[others[0] < 0].any()


def test_a_frozen_head_has_no_gradient_and_changes_nothing_else(backend: str):
    moving, frozen = (of_head(backend, MIXED[1], 1e-3, given(), frozen=frozen) for frozen in (False, True))
    demand(Difference(f"result {i}", relative_l2(*pair), FLOAT32.one_op) for i, pair in enumerate(zip(frozen[:4], moving[:4], strict=True)))
    assert moving[4].any()
    assert not frozen[4].any()


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it(backend: str):
    hidden, embed, targets, *_ = given()
    _, ce, kl, *gradients = of_head(backend, Mixed(41, 2.0, 1.0), 0.0, [hidden, embed, targets, hidden, embed])
    assert ce > 1
    assert abs(kl) < 1e-5
    assert all(np.abs(gradient).max() < 1e-6 for gradient in gradients)


def test_a_batch_without_targets_has_no_loss_and_no_gradient(backend: str):
    hidden, embed, targets, *others = given()
    for value in of_head(backend, MIXED[1], 1e-3, [hidden, embed, np.full_like(targets, -1), *others]):
        assert not value.any()


@pytest.fixture(scope="module")
def taught() -> tuple[Case, reference.Teacher]:
    """A case with documents that are kept apart, and its teacher."""
    return CASE, teacher()


@pytest.fixture(scope="module")
def step(taught: tuple[Case, reference.Teacher]) -> Any:
    """What a step reports, and its gradients, by backend and parts."""
    return functools.cache(lambda backend, parts=1: _step(backend, *taught, parts))


def _step(backend: str, case: Case, teacher: reference.Teacher, parts: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    side = subjects.make_backend(backend, case.model, dataclasses.replace(case.train, beta1=0.0, clip_norm=0.0, grad_accum=parts))
    side.learn_from(teacher.config, teacher.params, teacher.mixed.known)
    state, metrics = side.train_step(side.init(case.params), *case.batches[0], 1e-3, case.documents)
    moments = side.save(state).optimizer
    return side.read(metrics), {name: moments[f"mu.{name}"] for name in case.params}


def test_a_step_minimises_the_definition(backend: str, taught, step):
    told, gradients = step(backend)
    (case, teacher), wide = taught, {name: reference.as_float64(value) for name, value in taught[0].params.items()}
    inputs, targets = case.batches[0]

    def objective(params: dict[str, np.ndarray], mixed: Mixed = teacher.mixed, z_loss: float = case.train.z_loss) -> float:
        train = dataclasses.replace(case.train, z_loss=z_loss)
        return reference.objective(case.model, train, params, inputs, targets, case.documents, None, teacher._replace(mixed=mixed))

    expected = {
        "loss": objective(wide, z_loss=0.0),
        "kl": objective(wide, teacher.mixed._replace(alpha=1.0), 0.0) / teacher.mixed.temperature**2,
        "ce": objective(wide, teacher.mixed._replace(alpha=0.0), 0.0),
    }
    demand(Difference(name, abs(told[name] / value - 1), FLOAT32.loss) for name, value in expected.items())
    for name in ("embed.weight", "layers.1.ffn.up_proj.weight", "norm.weight"):
        direction = np.random.default_rng(2).standard_normal(gradients[name].shape)
        slope = directional_derivative(objective, wide, name, direction)
        error = abs(float((gradients[name] * direction).sum(dtype=np.float64)) - slope) / float(np.linalg.norm(gradients[name]))
        demand([Difference(f"gradient of {name}", error, case.tolerance.gradient)])


def test_parts_of_a_step_have_the_means_of_the_whole_step(backend: str, step):
    whole, parts = step(backend), step(backend, 2)
    demand(Difference(name, abs(parts[0][name] / whole[0][name] - 1), FLOAT32.same_arithmetic) for name in ("loss", "kl", "ce"))
    flat = (np.concatenate([side[1][name].ravel() for name in whole[1]]) for side in (parts, whole))
    demand([Difference("gradient", relative_l2(*flat), FLOAT32.same_arithmetic)])


def test_validation_is_the_cross_entropy_of_the_student_alone(backend: str, taught):
    case, teacher = taught
    side = subjects.make_backend(backend, case.model, case.train)
    state = side.init(case.params)
    before = side.read(side.eval_step(state, *case.batches[0], case.documents))
    side.learn_from(teacher.config, teacher.params, teacher.mixed.known)
    assert side.read(side.eval_step(state, *case.batches[0], case.documents)) == before


def test_twenty_steps_are_the_same_in_both_backends(both_backends):
    got, want = (steps(backend) for backend in both_backends)
    demand(checks.runs(got.run, want.run))
    for key in METRICS:
        off = max(abs(one[key] / other[key] - 1) for one, other in zip(got.told, want.told, strict=True))
        demand([Difference(key, off, FLOAT32.steps_loss)])


def test_rows_with_a_teacher_are_those_that_are_stored(backend: str):
    stored, losses = json.loads(PATH.read_text())[backend], steps(backend).run.losses
    if stored["made_with"] == rows.made_with(backend):
        assert losses == stored["loss"]
    demand([Difference("stored row", max(abs(a / b - 1) for a, b in zip(losses, stored["loss"], strict=True)), FLOAT32.steps_loss)])


def test_a_student_comes_nearer_to_its_teacher_than_by_the_texts_alone():
    pytest.importorskip("mlx.core")  # JAX compiles each for seconds
    both, alone = (steps("mlx", alpha).told[-1]["kl"] for alpha in (0.6, 1e-9))
    assert both < 0.97 * alone


def test_weights_that_are_not_of_the_teacher_are_refused(backend: str, taught):
    case, teacher = taught
    side = subjects.make_backend(backend, case.model, case.train)
    wrong: ModelConfig = dataclasses.replace(teacher.config, layers=2)
    with pytest.raises(CheckpointError, match=r"layers\.1"):
        side.learn_from(wrong, teacher.params, teacher.mixed.known)
