"""The one primitive of all objectives: cross-entropy with weights of any sign, losses of tokens, steps that minimise a formula of them."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from smedjan_common.reference import loss as reference_loss
from smedjan_common.reference import model as reference
from smedjan_common.reference.derivative import directional_derivative
from smedjan_common.training.objectives import OBJECTIVES
from tests.conformance import subjects
from tests.conformance.cases import DEFAULT_CASES, Case, train_config
from tests.conformance.compare import Difference, demand, relative_l2
from tests.conformance.gates import FLOAT32
from tests.fakes.objectives import PAIRED

BATCH, LENGTH, DIM, VOCAB = 3, 7, 24, 50
REFERENCE = -np.random.default_rng(9).uniform(1, 9, (4, 4)).astype(np.float32)


def inputs(K: int | None = None) -> tuple[np.ndarray, ...]:
    """What the head reads, its weight, targets of which some do not count, and weights of both signs."""
    rng = np.random.default_rng(5)
    hidden = rng.standard_normal((BATCH, LENGTH, DIM)).astype(np.float32)
    embed = rng.standard_normal((VOCAB, DIM)).astype(np.float32)
    shape = (BATCH, LENGTH) if K is None else (BATCH, LENGTH, K)
    targets = rng.integers(0, VOCAB, shape, dtype=np.int32)
    targets[rng.random(shape) < 0.3] = -1
    return hidden, embed, targets, rng.standard_normal(shape).astype(np.float32)


def of_head(backend: str, z_loss: float, *arrays: np.ndarray | None, frozen: bool = False, name: str = "cross_entropy") -> list[np.ndarray]:
    """Objective, loss and the gradients by what the head reads and by its weight, compiled as in a step."""
    framework, function = subjects.framework(backend), getattr(subjects.module(backend, "loss"), name)
    hidden, embed, targets, weights = (None if array is None else framework.array(array) for array in arrays)

    def both(pair: dict[str, Any]) -> Any:
        return function(pair["x"], pair["E"], targets, z_loss, weights, frozen)

    (objective, loss), gradients = framework.compile(values_and_gradients(backend, both))({"x": hidden, "E": embed})
    return [np.asarray(value) for value in (objective, loss, gradients["x"], gradients["E"])]


def values_and_gradients(backend: str, function: Any) -> Any:
    """Of a function that gives what is differentiated and something beside it."""
    if backend == "mlx":
        import mlx.core as mx

        return mx.value_and_grad(function)
    import jax

    return jax.value_and_grad(function, has_aux=True)


def by_definition(z_loss: float, hidden: np.ndarray, embed: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> float:
    logits, counted = hidden @ embed.T, (targets >= 0) if targets.ndim == 2 else (targets >= 0).any(-1)
    squared = np.square(reference_loss.logsumexp(logits))
    return reference_loss.weighted_cross_entropy(logits, targets, weights) + z_loss * float((squared * counted).sum())


@pytest.mark.parametrize(("K", "z_loss", "chunks"), [(None, 0.0, 4), (None, 0.1, 1), (3, 0.1, 4)])
def test_weighted_losses_and_their_gradients_are_those_of_the_definition(backend: str, K, z_loss, chunks, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(subjects.module(backend, "loss"), "loss_chunks", lambda tokens, vocab: chunks)
    hidden, embed, targets, weights = inputs(K)
    objective, loss, *gradients = of_head(backend, z_loss, hidden, embed, targets, weights)
    wide = {"x": hidden.astype(np.float64), "E": embed.astype(np.float64)}
    size = np.abs(weights).sum()  # the sum itself may be near 0
    demand(
        [
            Difference("objective", abs(objective - by_definition(z_loss, *wide.values(), targets, weights)) / size, FLOAT32.one_op),
            Difference("loss", abs(loss - by_definition(0.0, *wide.values(), targets, weights)) / size, FLOAT32.one_op),
        ]
    )
    for name, gradient in zip(wide, gradients, strict=True):
        direction = np.random.default_rng(1).standard_normal(gradient.shape)
        slope = directional_derivative(lambda at: by_definition(z_loss, at["x"], at["E"], targets, weights), wide, name, direction)
        error = abs(float((gradient * direction).sum(dtype=np.float64)) - slope) / np.linalg.norm(gradient)
        demand([Difference(f"slope by {name}", error, FLOAT32.loss)])


@pytest.mark.parametrize(
    ("name", "chunks", "z_loss"), [("cross_entropy", 4, 1e-3), ("cross_entropy", 1, 0.0), ("cross_entropy_by_kernel", 1, 1e-3)]
)
def test_weights_of_one_and_one_target_give_the_bits_of_no_weights(backend: str, name, chunks, z_loss, monkeypatch: pytest.MonkeyPatch):
    module = subjects.module(backend, "loss")
    if not hasattr(module, name):
        pytest.skip("MLX has no kernel of the loss")
    monkeypatch.setattr(module, "loss_chunks", lambda tokens, vocab: chunks)
    hidden, embed, targets, _ = inputs()
    plain = of_head(backend, z_loss, hidden, embed, targets, None, name=name)
    ones = np.ones((*targets.shape, 1), np.float32)
    for one, other in zip(of_head(backend, z_loss, hidden, embed, targets[..., None], ones, name=name), plain, strict=True):
        assert one.tobytes() == other.tobytes()


def test_a_weight_of_zero_is_a_target_that_does_not_count(backend: str):
    hidden, embed, targets, _ = inputs()
    weights = (np.arange(LENGTH) % 2 == 0).astype(np.float32) * np.ones(targets.shape, np.float32)
    left_out = np.where(weights > 0, targets, -1).astype(np.int32)
    sides = (of_head(backend, 0.0, hidden, embed, *pair) for pair in ((targets, weights), (left_out, None)))
    for one, other in zip(*sides, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_kernel_gives_the_weighted_loss():
    pytest.importorskip("jax", reason="jax is not installed here")
    given = inputs(3)
    sides = [of_head("jax", 1e-3, *given, name=name) for name in ("cross_entropy_by_kernel", "cross_entropy")]
    sizes = [np.abs(given[3]).sum()] * 2 + [np.linalg.norm(side) for side in sides[1][2:]]  # sums may be near 0
    found = zip(*sides, sizes, strict=True)
    demand(Difference(f"result {i}", float(np.linalg.norm(a - b) / size), FLOAT32.one_op) for i, (a, b, size) in enumerate(found))


def test_a_frozen_head_has_no_gradient_and_changes_no_other_bit(backend: str):
    moving, frozen = (of_head(backend, 1e-3, *inputs(), frozen=frozen) for frozen in (False, True))
    assert [a.tobytes() for a in moving[:3]] == [a.tobytes() for a in frozen[:3]]
    assert moving[3].any()
    assert not frozen[3].any()


def test_a_frozen_head_takes_no_product_for_its_gradient():
    """Counted in what JAX is asked to compute: logits and dx, and nothing beside them."""
    jax = pytest.importorskip("jax", reason="jax is not installed here")
    from smedjan_jax.loss import cross_entropy

    hidden, embed, targets, _ = (jax.numpy.asarray(array) for array in inputs())
    counts = []
    for frozen in (False, True):
        jaxpr = jax.make_jaxpr(jax.grad(lambda x, f=frozen: cross_entropy(x, embed, targets, 0.0, None, f)[0]))(hidden)
        counts.append(str(jaxpr).count("dot_general"))
    assert counts == [3, 2]


@pytest.mark.parametrize("chunks", [1, 4])
def test_losses_of_tokens_are_those_of_the_definition(backend: str, chunks, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(subjects.module(backend, "loss"), "loss_chunks", lambda tokens, vocab: chunks)
    hidden, embed, targets, _ = inputs()
    found = subjects.module(backend, "loss").token_losses(*(subjects.framework(backend).array(x) for x in (hidden, embed, targets)))
    expected = reference_loss.token_losses(hidden.astype(np.float64) @ embed.astype(np.float64).T, targets)
    demand([Difference("losses", relative_l2(np.asarray(found), expected), FLOAT32.one_op)])
    assert not np.asarray(found)[targets < 0].any()


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> Case:
    """A case whose objective is one of pairs of documents."""
    monkeypatch.setitem(OBJECTIVES, PAIRED.name, PAIRED)
    case = next(iter(DEFAULT_CASES.values()))
    train = dataclasses.replace(train_config(mask_documents=True, z_loss=1e-2), objective=PAIRED.name)
    return dataclasses.replace(case, train=train)


def step(backend: str, case: Case, ref: np.ndarray = REFERENCE, **changes: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What a step reports, and its gradients."""
    train = dataclasses.replace(case.train, beta1=0.0, clip_norm=0.0, **changes)
    side = subjects.make_backend(backend, case.model, train)
    state, metrics = side.train_step(side.init(case.params), *case.batches[0], 1e-3, case.documents, ref)
    moments = side.save(state).optimizer
    return side.read(metrics), {name: moments[f"mu.{name}"] for name in case.params}


def test_a_step_minimises_a_formula_of_the_losses_of_tokens(backend: str, pairs: Case):
    told, gradients = step(backend, pairs)
    logits = reference.forward(pairs.model, pairs.params, pairs.tokens, pairs.documents)
    inputs, targets = pairs.batches[0]

    def objective(params: dict[str, np.ndarray]) -> float:
        return reference.objective(pairs.model, pairs.train, params, inputs, targets, pairs.documents, REFERENCE)

    z_loss = pairs.train.z_loss * reference_loss.mean_z_loss(logits, targets)
    demand([Difference("loss", abs(told["loss"] / (objective(pairs.params) - z_loss) - 1), FLOAT32.loss)])
    assert told["tokens"] == (targets >= 0).sum()
    for name in ("embed.weight", "layers.1.ffn.up_proj.weight", "norm.weight"):
        direction = np.random.default_rng(2).standard_normal(gradients[name].shape)
        slope = directional_derivative(objective, {n: reference.as_float64(v) for n, v in pairs.params.items()}, name, direction)
        error = abs(float((gradients[name] * direction).sum(dtype=np.float64)) - slope) / np.linalg.norm(gradients[name])
        demand([Difference(f"gradient of {name}", error, pairs.tolerance.gradient)])


def test_parts_of_a_step_have_the_means_of_the_whole_step(backend: str, pairs: Case):
    whole, parts = step(backend, pairs), step(backend, pairs, grad_accum=2)
    for name in ("loss", "margin"):
        demand([Difference(name, abs(parts[0][name] / whole[0][name] - 1), FLOAT32.same_arithmetic)])
    flat = (np.concatenate([side[1][name].ravel() for name in whole[1]]) for side in (parts, whole))
    demand([Difference("gradient", relative_l2(*flat), FLOAT32.same_arithmetic)])


def test_a_policy_that_is_its_reference_has_a_loss_of_log_2(backend: str, pairs: Case):
    side = subjects.make_backend(backend, pairs.model, pairs.train)
    inputs, targets = pairs.batches[0]
    losses = side.token_losses(side.params_of(side.init(pairs.params)), inputs, targets, pairs.documents)
    assert losses.tobytes() == side.token_losses(side.place(pairs.params), inputs, targets, pairs.documents).tobytes()
    ref = np.stack([-np.where(pairs.documents == at, losses, 0).sum(1) for at in range(4)], axis=1)
    told, _ = step(backend, pairs, ref)
    assert told["loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert abs(told["margin"]) < 1e-5
    evaluated = side.read(side.eval_step(side.init(pairs.params), inputs, targets, pairs.documents, ref))
    assert evaluated["loss_sum"] / evaluated["units"] == pytest.approx(np.log(2), rel=1e-6)
    assert evaluated["units"] == int(PAIRED.units(np, targets, pairs.documents, ref))
