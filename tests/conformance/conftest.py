"""Parameters of the suite: `backend`; `case` (every combination), `default_case` (every mixer and feed-forward once) and `other_case` (the
rest, which takes one form of a check where `default_case` takes several: what a check costs is mostly JAX's compilations)."""

import importlib.util

import pytest

from tests.conformance.cases import CASES, DEFAULT_CASES, OTHER_CASES
from tests.conformance.subjects import BACKENDS

INSTALLED = {"jax": "jax", "mlx": "mlx.core"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, cases in (("case", CASES), ("default_case", DEFAULT_CASES), ("other_case", OTHER_CASES)):
        if name in metafunc.fixturenames:
            # tests of one case share its compiled functions, so they go to one worker
            metafunc.parametrize(name, [pytest.param(case, id=key, marks=pytest.mark.xdist_group(key)) for key, case in cases.items()])
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def _installed(request: pytest.FixtureRequest) -> None:
    """A test of a backend that is not on this machine is skipped, and says so."""
    needed = (
        BACKENDS
        if "both_backends" in request.fixturenames
        else (request.node.callspec.params.get("backend"),)
        if _has_params(request)
        else ()
    )
    for name in needed:
        if name and not _found(INSTALLED[name]):
            pytest.skip(f"{name} is not installed here")


@pytest.fixture
def both_backends() -> tuple[str, ...]:
    """Asks for both backends; the test is skipped where one is not installed."""
    return BACKENDS


def installed() -> list[str]:
    """The backends of this machine."""
    return [name for name in BACKENDS if _found(INSTALLED[name])]


def _has_params(request: pytest.FixtureRequest) -> bool:
    return hasattr(request.node, "callspec")


def _found(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        return False
