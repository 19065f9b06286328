"""Both backends train on the same batches by construction: the order is one pure function of integers, and no backend draws numbers."""

import ast
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smedjan_common.data.order import BatchOrder, permute, read_windows

ROOT = pathlib.Path(__file__).parents[2]

# (tokens, seq_len, batch size, seed) -> the windows of some steps: a change here makes every earlier seed mean another run
GOLDEN = {
    (1001, 16, 4, 0): {0: [55, 39, 5, 38], 1: [20, 50, 51, 42], 15: [27, 54, 16, 32], 1000: [17, 47, 2, 58]},
    (1000000, 1024, 8, 1337): {
        0: [481, 304, 131, 620, 115, 968, 708, 35],
        121: [368, 377, 208, 167, 835, 922, 96, 66],
        1000000: [536, 180, 499, 88, 593, 176, 649, 853],
    },
}


@pytest.mark.parametrize("dataset", GOLDEN)
def test_the_order_is_the_golden_one(dataset: tuple[int, int, int, int]):
    num_tokens, seq_len, batch_size, seed = dataset
    order = BatchOrder((num_tokens - 1) // seq_len, batch_size, seed)
    for step, windows in GOLDEN[dataset].items():
        assert order.windows(step).tolist() == windows


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**32), epoch=st.integers(0, 50))
def test_an_epoch_sees_every_window_once(n: int, seed: int, epoch: int):
    assert sorted(permute(np.arange(n), n, seed, epoch).tolist()) == list(range(n))


@given(windows=st.integers(1, 200), batch=st.integers(1, 40), seed=st.integers(0, 9), step=st.integers(0, 100), cut=st.integers(0, 40))
def test_a_batch_depends_on_the_step_alone(windows: int, batch: int, seed: int, step: int, cut: int):
    """Not on the steps asked for before (so a run resumes anywhere), nor on which rows a host reads."""
    order = BatchOrder(windows, batch, seed)
    fresh = BatchOrder(windows, batch, seed).windows(step)
    for earlier in range(step % 5):
        order.windows(earlier)
    assert np.array_equal(order.windows(step), fresh)
    halves = [order.windows(step, slice(0, cut)), order.windows(step, slice(cut, None))]
    assert np.array_equal(np.concatenate(halves), fresh)


def test_an_epoch_of_steps_covers_the_dataset():
    order = BatchOrder(50, 10, seed=4)
    assert sorted(np.concatenate([order.windows(step) for step in range(5)]).tolist()) == list(range(50))
    assert not np.array_equal(order.windows(0), order.windows(5))


def test_targets_are_the_inputs_one_later():
    tokens = np.arange(1000, dtype=np.uint16)
    inputs, targets = read_windows(tokens, np.array([0, 7, 3]), 16)
    assert inputs.dtype == targets.dtype == np.int32
    assert inputs[:, 0].tolist() == [0, 112, 48]
    assert np.array_equal(targets, inputs + 1)


@pytest.mark.parametrize("package", ["smedjan_jax", "smedjan_mlx"])
def test_no_backend_draws_random_numbers_or_chooses_data(package: str):
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            drawn = isinstance(node, ast.Attribute) and node.attr in {"random", "PRNGKey"} and isinstance(node.value, ast.Name)
            drawn = drawn and node.value.id in {"jax", "mx", "np", "numpy"}  # held.py only asks the device whether its kernels are right
            assert not drawn or path.name == "held.py", f"{path.name}:{node.lineno}"
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("smedjan_common.data"), f"{path.name}:{node.lineno}"
