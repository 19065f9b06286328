"""How the suite is shared out to workers."""

import os

import pytest


@pytest.mark.xdist_group("one-worker")
@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="a single process")
def test_tests_of_a_group_go_to_one_worker(request):
    """pytest-xdist 3.8 reads the group from the name, which pytest 9.2 does not let it change: every worker compiled every case."""
    assert request.node.nodeid.endswith("@one-worker")
