"""Sequences of longrope turn by one list up to the original context and by another beyond it, all of their positions: in training and
scoring the length of the row decides, in decoding the positions that the state can hold."""

import dataclasses

import numpy as np
import pytest

from smedjan_common.model.rope import settled
from smedjan_common.reference import model as reference
from tests.conformance import subjects
from tests.conformance.cases import CASES
from tests.conformance.compare import Difference, Mismatch, demand, largest

CASE = CASES["attention-swiglu-mha-longrope"]
SHORT, LONG = CASE.model.rope_short_factors, CASE.model.rope_long_factors
ORIGINAL = CASE.model.rope_original_len


def expected(factors: tuple[float, ...], length: int) -> np.ndarray:
    """The definition's logits after the last of so many tokens, all turned by these factors."""
    model = dataclasses.replace(CASE.model, rope_short_factors=factors, rope_long_factors=factors)
    return reference.forward(model, CASE.params, CASE.tokens[:, :length])[:, -1]


@pytest.mark.parametrize(("length", "factors"), [(ORIGINAL, SHORT), (ORIGINAL + 1, LONG)])
def test_the_length_of_a_row_decides_for_all_of_it(backend: str, length: int, factors: tuple[float, ...]):
    assert settled(CASE.model, length).rope_short_factors == settled(CASE.model, length).rope_long_factors == factors
    got = {"definition": reference.forward(CASE.model, CASE.params, CASE.tokens[:, :length])[:, -1]}
    got["logits"] = subjects.logits(backend, CASE.model, CASE.params, CASE.tokens[:, :length])[:, -1]
    demand(Difference(how, largest(value, expected(factors, length)), CASE.tolerance.forward) for how, value in got.items())


@pytest.mark.parametrize(("held", "factors", "other"), [(ORIGINAL, SHORT, LONG), (ORIGINAL + 1, LONG, SHORT)])
def test_the_room_of_a_decode_state_decides_from_the_first_token_on(
    backend: str, held: int, factors: tuple[float, ...], other: tuple[float, ...]
):
    chunks = [CASE.tokens[:, :4], CASE.tokens[:, 4:5], CASE.tokens[:, 5:6]]
    got = subjects.decode(backend, CASE.model, CASE.params, chunks, held)[-1]
    demand([Difference("logits", largest(got, expected(factors, 6)), CASE.tolerance.forward)])
    with pytest.raises(Mismatch):
        demand([Difference("logits", largest(got, expected(other, 6)), CASE.tolerance.forward)])
