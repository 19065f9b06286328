"""Adapters beside a frozen base, in both backends, against the definition: a model whose matrices are W + s B A, in float64."""

import dataclasses
import os

import numpy as np
import pytest

from smedjan_common.backend import Snapshot
from smedjan_common.model.adapters import adapted_maps, adapter_table, merged, with_adapters
from smedjan_common.model.ffns import FFNS
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.params import parameter_table
from smedjan_common.reference import model as reference
from smedjan_common.reference.derivative import directional_derivative
from tests.conformance import checks, subjects
from tests.conformance.cases import CASES, DEFAULT_CASES, Case
from tests.conformance.compare import Difference, demand, demand_equal_bits, relative_l2

LORA = {"lora_rank": 4, "lora_alpha": 6.0, "lora_rows_from": 50, "lora_rows": 3}
FULL = os.environ.get("SMEDJAN_TEST_FULL") == "1"
CHOSEN = list(DEFAULT_CASES) if FULL else list(DEFAULT_CASES)[:1]


@pytest.fixture(scope="module", params=CHOSEN)
def adapted(request: pytest.FixtureRequest) -> Case:
    """A model with adapters that have learned something: their B are not zero."""
    found = CASES[request.param]
    return dataclasses.replace(found, train=dataclasses.replace(found.train, **LORA))


def start(adapted: Case, learned: bool = True) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    params = with_adapters(adapted.model, adapted.train.adapters, adapted.params, adapted.train.seed)
    moved = {name for name in adapter_table(adapted.model, adapted.train.adapters) if not name.endswith("lora_a")} if learned else ()
    return {n: (v + 0.1 * rng.standard_normal(v.shape)).astype(np.float32) if n in moved else v for n, v in params.items()}


def definition(adapted: Case, params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The model without adapters, float64."""
    adapters, whole = adapted.train.adapters, {name: params[name].astype(np.float64) for name in parameter_table(adapted.model)}
    for path in adapted_maps(adapted.model, adapters):
        whole[f"{path}.weight"] += 6.0 / 4 * params[f"{path}.lora_b"].astype(np.float64) @ params[f"{path}.lora_a"].astype(np.float64)
    for name in {"embed", "head"} & {name.split(".")[0] for name in params}:
        whole[f"{name}.weight"][50:53] = params[f"{name}.new_rows"]
    return whole


def objective(adapted: Case, params: dict[str, np.ndarray]) -> float:
    return reference.objective(adapted.model, adapted.train, definition(adapted, params), *adapted.batches[0])


def test_loss_and_gradients_are_those_of_the_merged_model(backend: str, adapted: Case):
    params, batch = start(adapted), adapted.batches[0]
    loss, grads = subjects.loss_and_gradients(backend, adapted.model, adapted.train, params, batch)
    assert grads.keys() == adapter_table(adapted.model, adapted.train.adapters).keys(), "and the base has no optimizer state"
    expected, rng, found = reference.loss(adapted.model, definition(adapted, params), *batch), np.random.default_rng(0), []
    errors, sizes, wide = [], [], {name: reference.as_float64(value) for name, value in params.items()}
    for name, grad in grads.items():
        direction = rng.standard_normal(grad.shape)
        slope = directional_derivative(lambda moved: objective(adapted, moved), wide, name, direction)
        errors.append(float((grad * direction).sum(dtype=np.float64)) - slope)
        sizes.append(np.square(grad, dtype=np.float64).sum())
    found.append(Difference(f"{backend} gradient", float(np.linalg.norm(errors) / np.sqrt(sum(sizes))), adapted.tolerance.gradient))
    found.append(Difference(f"{backend} loss", abs(loss / expected - 1), adapted.gates.loss))
    demand(found)


def test_twenty_steps_are_the_same_in_both_backends_and_the_base_is_still(both_backends, adapted: Case):
    begin = start(adapted, learned=False)
    jax, mlx = (subjects.train(name, adapted.model, adapted.train, begin, adapted.batches) for name in ("jax", "mlx"))
    demand(checks.runs(mlx, jax))
    assert all(value.any() for value in mlx.snapshot.params.values()), "every B has left zero"
    for name, run in (("jax", jax), ("mlx", mlx)):
        assert run.snapshot.params.keys() == adapter_table(adapted.model, adapted.train.adapters).keys()
        side = subjects.backend(name, adapted.model, adapted.train)
        state = side.restore(Snapshot(run.snapshot.step, begin | run.snapshot.params, run.snapshot.optimizer))
        before = {path: value for path, value in state["params"].items() if path in adapted.params}
        demand_equal_bits({path: np.array(value) for path, value in before.items()}, dict(adapted.params))
        whole = subjects.on_host(side.params_of(state))
        expected = merged(adapted.model, adapted.train.adapters, begin | run.snapshot.params)
        assert whole.keys() == adapted.params.keys() == expected.keys()
        assert max(relative_l2(whole[path], expected[path]) for path in whole) < adapted.gates.one_op
        sums = side.read(side.eval_step(state, *adapted.batches[0]))
        plain = reference.loss(adapted.model, {path: reference.as_float64(value) for path, value in expected.items()}, *adapted.batches[0])
        demand([Difference(f"{name} loss of the merged model", abs(sums["loss_sum"] / sums["tokens"] / plain - 1), adapted.gates.loss)])


def test_the_norm_is_of_what_is_trained_and_a_snapshot_goes_on_bit_for_bit(backend: str, adapted: Case):
    begin, batches = start(adapted), adapted.batches[:4]
    _, grads = subjects.loss_and_gradients(backend, adapted.model, adapted.train, begin, batches[0])
    whole = subjects.train(backend, adapted.model, adapted.train, begin, batches)
    norm = np.sqrt(sum(np.square(grad, dtype=np.float64).sum() for grad in grads.values()))
    assert whole.grad_norms[0] == pytest.approx(norm, rel=adapted.gates.loss)
    half = subjects.train(backend, adapted.model, adapted.train, begin, batches[:2]).snapshot
    rest = subjects.train(backend, adapted.model, adapted.train, dataclasses.replace(half, params=begin | half.params), batches[2:])
    assert rest.losses == whole.losses[2:]
    demand_equal_bits(rest.snapshot.params, whole.snapshot.params)


def test_every_mixer_and_feed_forward_has_maps_that_can_be_adapted():
    for case in CASES.values():
        if case.model.ffn != ("experts",):
            paths = adapted_maps(case.model, dataclasses.replace(case.train, **LORA).adapters)
            blocks = {tuple(path.split(".")[1:3]) for path in paths}
            assert blocks == {(str(layer), part) for layer in range(case.model.layers) for part in ("mixer", "ffn")}
    assert {name for case in CASES.values() for name in case.model.mixer} == set(MIXERS)
    assert {name for case in CASES.values() for name in case.model.ffn} == set(FFNS)
