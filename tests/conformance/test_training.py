"""Training: 20-step runs of both backends, settings that must change nothing."""

import json

import numpy as np
import pytest

from smedjan_common.reference.optim import clip_by_global_norm, global_norm
from tests.conformance import checks, rows, subjects
from tests.conformance.cases import Case
from tests.conformance.compare import Difference, demand, demand_equal_bits, relative_l2
from tests.conformance.gates import FLOAT32


def test_grad_norm_is_the_norm_before_clipping(backend: str, default_case: Case):
    run = rows.run(backend, default_case)
    grads = subjects.loss_and_gradients(backend, default_case.model, default_case.train, default_case.start, default_case.batches[0])[1]
    expected = global_norm(grads)
    assert expected > default_case.train.clip_norm, "the case should be one that clips"
    demand([Difference("grad_norm of the first step", abs(run.grad_norms[0] / expected - 1), FLOAT32.loss)])


def test_a_training_step_moves_the_parameters_by_clipped_adamw(backend: str, default_case: Case):
    """The step as a whole: its own gradients, clipped by the reference, give the first moments that it stores."""
    params, batch = default_case.params, default_case.batches[0]
    grads = subjects.loss_and_gradients(backend, default_case.model, default_case.train, params, batch)[1]
    clipped, _ = clip_by_global_norm(grads, default_case.train.clip_norm)
    snapshot = subjects.train(backend, default_case.model, default_case.train, params, default_case.batches[:1]).snapshot
    beta1 = default_case.train.beta1
    demand(Difference(name, relative_l2(snapshot.optimizer[f"mu.{name}"], (1 - beta1) * clipped[name]), FLOAT32.one_op) for name in params)


def test_twenty_steps_are_the_same_in_both_backends(both_backends, case: Case):
    demand(checks.runs(rows.run("mlx", case), rows.run("jax", case)))


def test_training_lowers_the_loss_of_a_batch_that_repeats(backend: str, default_case: Case):
    run = subjects.train(backend, default_case.model, default_case.train, default_case.start, default_case.batches[:1] * 20)
    assert run.losses[-1] < 0.8 * run.losses[0], f"{run.losses[0]:.3f} -> {run.losses[-1]:.3f}"


def test_a_run_repeated_in_a_fresh_backend_has_the_same_bits(backend: str, default_case: Case):
    first = rows.run(backend, default_case)
    side = subjects.make_backend(backend, default_case.model, default_case.train)
    state, losses = side.init(default_case.start), []
    for step, batch in enumerate(default_case.batches):
        state, metrics = side.train_step(state, *batch, lr=rows.learning_rate(default_case.train, step))
        losses.append(side.read(metrics)["loss"])
    assert losses == first.losses
    snapshot = side.save(state)
    demand_equal_bits(snapshot.params, first.snapshot.params)
    demand_equal_bits(snapshot.optimizer, first.snapshot.optimizer)


def test_loss_rows_are_those_that_are_stored(backend: str, case: Case, record_property):
    """Bit-equal where the row was made with these versions on this kind of CPU (see rows.py), else within the 20-step gate."""
    stored = json.loads(rows.path(case).read_text())[backend]
    run = rows.run(backend, case)
    exact = stored["made_with"] == rows.made_with(backend)
    record_property("row compared", "exactly" if exact else f"within {FLOAT32.steps_loss}")
    for key, got in (("loss", run.losses), ("grad_norm", run.grad_norms)):
        want = stored[key]
        if exact:
            assert got == want, f"{backend} {key}: bits changed at step {next(i for i in range(len(want)) if got[i] != want[i])}"
        worst = max(abs(a / b - 1) for a, b in zip(got, want, strict=True))
        demand(
            [Difference(f"{backend} {key} against the stored row", worst, FLOAT32.steps_loss if key == "loss" else FLOAT32.steps_params)]
        )


def test_accumulating_two_parts_equals_one_big_batch(backend: str, default_case: Case):
    demand(checks.accumulation(backend, default_case, 2))


@pytest.mark.parametrize("kept", ["dots", "full"])
def test_gradient_checkpointing_changes_nothing(backend: str, default_case: Case, kept: str):
    demand(checks.same_step(backend, default_case, gradient_checkpointing=kept))


def test_deterministic_training_computes_the_same(backend: str, default_case: Case):
    """The gradient of the embedding by matrix products, where a GPU would add in any order."""
    demand(checks.same_step(backend, default_case, deterministic=True))


def test_restoring_a_snapshot_continues_bit_for_bit(backend: str, default_case: Case):
    start = default_case.start
    first = subjects.train(backend, default_case.model, default_case.train, start, default_case.batches[:9]).snapshot
    assert first.step == 9
    second = subjects.train(backend, default_case.model, default_case.train, first, default_case.batches[9:])
    whole = rows.run(backend, default_case)
    assert second.losses == whole.losses[9:]
    assert second.snapshot.step == whole.snapshot.step == len(default_case.batches)
    demand_equal_bits(second.snapshot.params, whole.snapshot.params)
    demand_equal_bits(second.snapshot.optimizer, whole.snapshot.optimizer)


def test_snapshots_are_float32_arrays_on_the_host(backend: str, default_case: Case):
    snapshot = rows.run(backend, default_case).snapshot
    for name, value in {**snapshot.params, **snapshot.optimizer}.items():
        assert isinstance(value, np.ndarray), name
        assert value.dtype == np.float32, name
