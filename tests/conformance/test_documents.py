"""Documents of one row are kept apart: each is computed as if it stood alone, in every mixer that says it can."""

import dataclasses

import numpy as np
import pytest

from smedjan_common.model.mixers import MIXERS
from tests.conformance import checks, subjects
from tests.conformance.cases import CASES, DEFAULT_CASES, Case
from tests.conformance.compare import Mismatch, demand


def keeps_apart(case: Case) -> bool:
    return all(MIXERS[name].documents for name in case.model.mixer)


def cases(table: dict[str, Case]) -> list:
    """The cases whose rows keep documents apart; the others refuse --mask-documents (tests/unit/test_config.py)."""
    return [pytest.param(case, id=name, marks=pytest.mark.xdist_group(name)) for name, case in table.items() if keeps_apart(case)]


@pytest.mark.parametrize("apart", cases({name: case for name, case in CASES.items() if case.model.ffn == ("swiglu",)}))
def test_logits_are_those_of_each_document_by_itself(backend: str, apart: Case):
    demand(checks.forward(backend, apart, documents=apart.documents))


@pytest.mark.parametrize("apart", cases(DEFAULT_CASES))
def test_gradients_are_those_of_each_document_by_itself(backend: str, apart: Case):
    demand(checks.gradient(backend, apart, apart.documents))


@pytest.mark.parametrize("apart", cases(DEFAULT_CASES))
def test_other_documents_change_no_bit(backend: str, apart: Case):
    checks.isolation(backend, apart)


@pytest.mark.parametrize("apart", cases(DEFAULT_CASES))
def test_documents_go_with_their_rows_through_accumulation_and_checkpointing(backend: str, apart: Case):
    whole = subjects.loss_and_gradients(backend, apart.model, apart.train, apart.params, apart.batches[0], apart.documents)[0]
    changed = dataclasses.replace(apart.train, grad_accum=2, gradient_checkpointing="full")
    parts = subjects.loss_and_gradients(backend, apart.model, changed, apart.params, apart.batches[0], apart.documents)[0]
    assert abs(parts / whole - 1) <= apart.gates.same_arithmetic


WITH_DECAY = "linear-swiglu-mha", "ssm-swiglu-mha", "gated-deltanet-swiglu-mha"
STRONGEST = {"A_log": 3.6, "dt_bias": 4.0, "decay_bias": -200.0}  # e^-150 and less from one position to the next


@pytest.mark.parametrize("apart", cases({name: CASES[name] for name in WITH_DECAY}))
def test_the_strongest_decay_of_an_earlier_document_leaves_the_next_one_finite(backend: str, apart: Case):
    """What one document forgot may lie under what the next one did by more than e can be raised to."""
    strong = {
        name: next((np.full_like(value, how) for end, how in STRONGEST.items() if name.endswith(end)), value)
        for name, value in apart.params.items()
    }
    assert any((strong[name] != apart.params[name]).any() for name in strong)
    sides = (subjects.logits(side, apart.model, strong, apart.tokens, documents=apart.documents) for side in (backend, "reference"))
    demand([checks.Difference("logits", checks.largest(*sides), apart.tolerance.forward)])
    gradients = subjects.loss_and_gradients(backend, apart.model, apart.train, strong, apart.batches[0], apart.documents)[1]
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


def test_evaluation_keeps_documents_apart_too(backend: str):
    case = next(iter(DEFAULT_CASES.values()))
    side = subjects.backend(backend, case.model, case.train)
    state = side.init(case.params)
    sums = [side.read(side.eval_step(state, *case.batches[0], documents))["loss_sum"] for documents in (case.documents, None)]
    expected = subjects.reference.loss(case.model, case.params, *case.batches[0], case.documents)
    counted = float((case.batches[0][1] >= 0).sum())
    assert abs(sums[0] / counted / expected - 1) <= case.gates.loss
    assert abs(sums[1] / sums[0] - 1) > 1e-3, "the case must tell the two apart"


def test_a_border_in_the_wrong_place_is_caught(backend: str):
    case = next(iter(DEFAULT_CASES.values()))
    wrong = np.roll(case.documents, 1, axis=1)
    wrong[:, 0] = 0
    expected = subjects.logits("reference", case.model, case.params, case.tokens, documents=case.documents)
    got = subjects.logits(backend, case.model, case.params, case.tokens, documents=wrong)
    with pytest.raises(Mismatch):
        demand([checks.Difference("logits", checks.largest(got, expected), case.tolerance.forward)])
