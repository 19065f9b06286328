"""Property tests of `make test` draw the same cases on every machine and in every order of tests."""

import importlib.util
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.skipif(settings.get_current_profile_name() != "same", reason="this run searches freely")


def drawn() -> list[list[int]]:
    """The cases of a small property test."""
    cases = []

    @given(st.lists(st.integers(), min_size=5))
    def collect(numbers: list[int]) -> None:
        cases.append(numbers)

    collect()
    return cases


def test_modules_that_other_tests_import_do_not_change_the_cases(tmp_path):
    before = drawn()
    (tmp_path / "odd_numbers.py").write_text(f"NUMBERS = {list(range(70_001, 71_001, 2))}\n")
    spec = importlib.util.spec_from_file_location("odd_numbers", tmp_path / "odd_numbers.py")
    assert spec
    assert spec.loader
    sys.modules["odd_numbers"] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        assert drawn() == before
    finally:
        del sys.modules["odd_numbers"]


def test_the_cases_are_drawn_from_the_test_alone_and_not_from_chance():
    assert drawn() == drawn()
    assert any(drawn())
