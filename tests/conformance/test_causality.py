"""Exact causality: nothing that comes later reaches an output, not by one bit."""

import pytest

from tests.conformance import checks
from tests.conformance.cases import LENGTH, Case


@pytest.mark.parametrize("position", [0, LENGTH // 2])
def test_later_tokens_change_no_bit_and_have_zero_gradient(backend: str, default_case: Case, position: int):
    checks.causality(backend, default_case, position)


def test_later_tokens_change_no_bit_and_have_zero_gradient_in_every_combination(backend: str, other_case: Case):
    checks.causality(backend, other_case, LENGTH // 2)
