"""Optimizers: every row of the table against its definition, in both backends, with its own state and nothing else."""

import dataclasses

import numpy as np
import pytest

from smedjan_common.errors import CheckpointError
from smedjan_common.model import adapters, params
from smedjan_common.model.params import parameter_table
from smedjan_common.training.optimizers import OPTIMIZERS
from tests.conformance import checks, subjects
from tests.conformance.cases import DEFAULT_CASES, Case, train_config
from tests.conformance.compare import Difference, demand, demand_equal_bits, relative_l2
from tests.conformance.gates import BFLOAT16, FLOAT32

FIRST = next(iter(DEFAULT_CASES.values()))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_optimizer_equals_its_definition_for_20_steps(backend: str, default_case: Case, optimizer: str):
    demand(checks.optimizer(backend, using(default_case, optimizer)))


def using(case: Case, optimizer: str, **changes: object) -> Case:
    """The case trained with another optimizer."""
    return dataclasses.replace(case, train=train_config(optimizer=optimizer, **changes))


@pytest.mark.parametrize("change", [{"clip_norm": 0.0}, {"weight_decay": 0.0}, {"beta1": 0.8, "beta2": 0.99, "eps": 1e-6}], ids=str)
def test_optimizer_settings_mean_the_same_in_both_backends_and_in_the_definition(backend: str, default_case: Case, change: dict):
    demand(checks.optimizer(backend, dataclasses.replace(default_case, train=train_config(**change))))


@pytest.mark.parametrize("change", [{"muon_momentum": 0.8, "muon_steps": 3}, {"muon_nesterov": False}, {"beta1": 0.8}], ids=str)
def test_muon_settings_mean_the_same_in_both_backends_and_in_the_definition(backend: str, change: dict):
    demand(checks.optimizer(backend, using(FIRST, "muon", **change)))


@pytest.mark.parametrize("change", [{"beta1": 0.8, "beta2": 0.9}, {"weight_decay": 0.0}], ids=str)
def test_lion_settings_mean_the_same_in_both_backends_and_in_the_definition(backend: str, change: dict):
    demand(checks.optimizer(backend, using(FIRST, "lion", **change)))


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_the_average_of_the_weights_equals_its_definition_while_it_warms_up_and_after(backend: str, optimizer: str):
    case = using(FIRST, optimizer, ema=0.5)  # (1 + t) / (10 + t) reaches it at step 8
    demand(checks.optimizer(backend, case))
    checks.tree(backend, case)


def test_twenty_steps_with_an_average_are_the_same_in_both_backends_and_may_change_hands(both_backends):
    case = using(FIRST, "adamw", ema=0.9)
    mlx, jax = (subjects.train(name, case.model, case.train, case.params, case.batches) for name in ("mlx", "jax"))
    demand(checks.runs(mlx, jax))
    half = subjects.train("mlx", case.model, case.train, case.params, case.batches[:10]).snapshot
    rest = subjects.train("jax", case.model, case.train, half, case.batches[10:]).snapshot
    demand(Difference(name, relative_l2(value, jax.snapshot.weights[name]), FLOAT32.steps_params) for name, value in rest.weights.items())


def test_evaluation_and_decoding_take_the_average_and_training_does_not(backend: str):
    case, without = using(FIRST, "adamw", ema=0.9), using(FIRST, "adamw")
    side, plain = (subjects.backend(backend, each.model, each.train) for each in (case, without))
    snapshot = subjects.train(backend, case.model, case.train, case.params, case.batches[:5]).snapshot

    def loss(of, state) -> float:
        return of.read(of.eval_step(state, *case.batches[5]))["loss_sum"]

    averaged, moved = (loss(plain, plain.init(params)) for params in (snapshot.weights, snapshot.params))
    assert averaged != moved
    assert loss(side, side.restore(snapshot)) == averaged
    decoded = side.decoder(side.params_of(side.restore(snapshot)), 8).feed([1, 2, 3])
    np.testing.assert_array_equal(decoded, side.decoder(snapshot.weights, 8).feed([1, 2, 3]))
    other = subjects.train(backend, case.model, without.train, case.params, case.batches[:5])
    demand_equal_bits(snapshot.params, other.snapshot.params)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_parameters_keep_their_own_learning_rate_and_frozen_ones_stay(backend: str, optimizer: str, monkeypatch: pytest.MonkeyPatch):
    """lr_scale of the parameter table: a quarter for one matrix, and 0 for another matrix, for a norm: no state, no step, no decay."""
    scales = {"layers.0.mixer.q_proj.weight": 0.25, "layers.0.ffn.up_proj.weight": 0.0, "norm.weight": 0.0}
    table = {name: spec._replace(lr_scale=scales.get(name, 1.0)) for name, spec in parameter_table(FIRST.model).items()}
    for owner in (params, adapters, checks):
        monkeypatch.setattr(owner, "parameter_table", lambda model: table)
    case = using(FIRST, optimizer, seed=99)  # a configuration of its own: what is compiled here serves no other test
    demand(checks.optimizer(backend, case))
    snapshot = subjects.optimizer_run(backend, case.model, case.train, case.params, checks.optimizer_gradients(case)[:2])
    frozen = [name for name in scales if scales[name] == 0]
    demand_equal_bits({name: snapshot.params[name] for name in frozen}, {name: case.params[name] for name in frozen})
    assert not {tensor.partition(".")[2] for tensor in snapshot.optimizer} & set(frozen)


@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != FIRST.train.optimizer])
def test_twenty_steps_with_every_optimizer_are_the_same_in_both_backends(both_backends, optimizer: str):
    case = using(FIRST, optimizer, lr=3e-3 * OPTIMIZERS[optimizer].lr)
    mlx, jax = (subjects.train(name, case.model, case.train, case.params, case.batches) for name in ("mlx", "jax"))
    demand(checks.runs(mlx, jax))
    assert mlx.losses[-1] < mlx.losses[0]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_state_starts_with_zeros_in_the_slots_of_its_optimizer(backend: str, optimizer: str):
    checks.tree(backend, using(FIRST, optimizer))


@pytest.mark.parametrize(("optimizer", "ema"), [*((name, 0.0) for name in OPTIMIZERS if name != "adamw"), ("adamw", 0.99)])
def test_a_snapshot_of_any_optimizer_continues_bit_for_bit(backend: str, optimizer: str, ema: float):
    case = using(FIRST, optimizer, ema=ema)
    whole = subjects.train(backend, case.model, case.train, case.params, case.batches[:6])
    half = subjects.train(backend, case.model, case.train, case.params, case.batches[:3]).snapshot
    rest = subjects.train(backend, case.model, case.train, half, case.batches[3:6])
    assert rest.losses == whole.losses[3:]
    demand_equal_bits(rest.snapshot.params, whole.snapshot.params)
    demand_equal_bits(rest.snapshot.optimizer, whole.snapshot.optimizer)


def test_a_state_of_another_optimizer_or_with_a_wrong_array_is_refused_by_name(backend: str):
    case, wanted = using(FIRST, "muon"), using(FIRST, "adamw")
    side = subjects.backend(backend, wanted.model, wanted.train)
    muon = subjects.backend(backend, case.model, case.train)
    with pytest.raises(CheckpointError, match=r"--optimizer adamw: nu\.layers\.0\.mixer\.q_proj\.weight is missing"):
        side.restore(muon.save(muon.init(case.params)))
    snapshot = side.save(side.init(wanted.params))
    for changes, wrong in (
        ({"nu.norm.weight": np.zeros(3, np.float32)}, r"nu\.norm\.weight has shape \(3,\), not \(32,\)"),
        ({"rho.norm.weight": np.zeros(32, np.float32)}, r"rho\.norm\.weight is none of its arrays"),
    ):
        with pytest.raises(CheckpointError, match=wrong):
            side.restore(dataclasses.replace(snapshot, optimizer={**snapshot.optimizer, **changes}))


def test_muon_in_bfloat16_moves_matrices_as_its_definition_does_up_to_rounding(backend: str):
    """Newton-Schulz runs in the compute dtype; the momentum and the other tensors stay float32."""
    case = using(FIRST, "muon", dtype="bfloat16")
    grads = checks.optimizer_gradients(case)
    moved, state = checks.reference_optimizer_run(case, grads)
    snapshot = subjects.optimizer_run(backend, case.model, case.train, case.params, grads)
    for name, spec in parameter_table(case.model).items():
        start, gate = (case.params[name].astype(np.float64), BFLOAT16.same_arithmetic) if spec.matrix else (0.0, FLOAT32.one_op)
        demand([Difference(name, relative_l2(snapshot.params[name] - start, moved[name] - start), gate)])
        demand([Difference(f"momentum of {name}", relative_l2(snapshot.optimizer[f"mu.{name}"], state.slots["mu"][name]), FLOAT32.one_op)])


def test_newton_schulz_drives_singular_values_to_about_one(backend: str):
    matrices = np.random.default_rng(2).standard_normal((3, 24, 40)).astype(np.float32)
    matrices[1] *= np.linspace(0.1, 1, 40, dtype=np.float32)  # singular values far apart
    matrices /= np.linalg.norm(matrices, axis=(1, 2), keepdims=True)
    turned = np.asarray(subjects.module(backend, "optim").newton_schulz(subjects.framework(backend).array(matrices), 5))
    for before, after in zip(matrices, turned, strict=True):
        (left, _, right), values = np.linalg.svd(before, full_matrices=False), np.linalg.svd(after, compute_uv=False)
        assert values.min() > 0.6, values
        assert values.max() < 1.25, values
        inside = left.T @ after @ right.T
        assert np.abs(inside - np.diag(np.diag(inside))).max() < 1e-4, "it turns no singular vector"
