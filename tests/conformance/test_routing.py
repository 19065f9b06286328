"""What a step of a model with experts tells and does beside its gradients: loads, balance losses, and the bias that balances."""

import dataclasses

import numpy as np
import pytest

from smedjan_common.model.ffns.experts import load_names
from tests.conformance import checks, subjects
from tests.conformance.cases import CASES, Case
from tests.conformance.compare import Mismatch, demand
from tests.conformance.routing import margin

ROUTED = {key: case for key, case in CASES.items() if load_names(case.model)}
FIRST = {key: case for key, case in ROUTED.items() if case.model.mixer == ("attention",)}
BIAS = CASES["attention-experts-mha-bias"]


def params(table: dict[str, Case]) -> list:
    return [pytest.param(case, id=key, marks=pytest.mark.xdist_group(key)) for key, case in table.items()]


@pytest.mark.parametrize("routed", params(ROUTED))
def test_routers_of_a_case_are_far_from_ties(routed: Case):
    """A tenth of the score's own scale, where float32 errs by 1e-6 and a directional derivative steps by 1e-3."""
    for values in (routed.params, routed.start):
        assert margin(routed.model, values, routed.tokens) > 0.1


def test_a_bias_of_a_case_decides_for_many_tokens():
    without = {name: value * (not name.endswith("router.bias")) for name, value in BIAS.params.items()}
    sides = [subjects.logits("reference", BIAS.model, values, BIAS.tokens) for values in (BIAS.params, without)]
    assert np.mean(np.abs(sides[0] - sides[1]).max(axis=-1) > 1e-2) > 0.4


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("routed", params(FIRST))
def test_loads_losses_and_biases_of_a_step_are_those_of_the_definition(backend: str, routed: Case, parts: int):
    demand(checks.routing(backend, routed, parts))


def test_a_step_without_counted_targets_moves_no_bias(backend: str):
    inputs, targets = BIAS.batches[0]
    side = subjects.backend(backend, BIAS.model, BIAS.train)
    state, _ = side.train_step(side.init(BIAS.params), inputs, np.full_like(targets, -1), lr=1e-3)
    for name, value in side.save(state).params.items():
        assert not name.endswith("router.bias") or np.array_equal(value, BIAS.params[name]), name


def test_accumulating_parts_with_the_bias_router_is_one_big_batch(backend: str):
    """Loads are counted over all parts, and there is no loss that depends on the part: gradients and biases are those of one batch."""
    runs = []
    for parts in (1, 2):
        config = dataclasses.replace(BIAS.train, grad_accum=parts)
        runs.append(subjects.train(backend, BIAS.model, config, BIAS.params, BIAS.batches[:1]))
    biases = [{n: v for n, v in run.snapshot.params.items() if n.endswith("router.bias")} for run in runs]
    assert all(np.array_equal(biases[0][name], biases[1][name]) for name in biases[0])
    assert abs(runs[1].losses[0] / runs[0].losses[0] - 1) < BIAS.gates.same_arithmetic


def test_a_dense_model_tells_nothing_of_routing(backend: str):
    case = CASES["attention-swiglu-mha"]
    side = subjects.backend(backend, case.model, case.train)
    _, metrics = side.train_step(side.init(case.params), *case.batches[0], lr=1e-3)
    assert set(side.read(metrics)) == {"loss", "grad_norm", "tokens"}


def test_a_near_tie_in_a_case_would_be_seen(backend: str):
    case = CASES["attention-experts-mha"]
    tied = {name: value * (0.0 if name.endswith("router.weight") else 1.0) for name, value in case.params.items()}
    assert margin(case.model, tied, case.tokens) == 0
    with pytest.raises(Mismatch):
        demand([step for step in checks.routing(backend, case, wrong=tied) if "load" in step.name])
