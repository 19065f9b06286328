"""Kernels and their plain twins on a GPU, as they are; on a CPU: test_kernels.py.

SMEDJAN_TEST_DEVICE=gpu python -m pytest -m gpu tests/conformance/test_kernels_gpu.py
"""

import itertools

import numpy as np
import pytest

from tests.conformance.compare import Difference, demand, demand_equal_bits, relative_l2
from tests.conformance.kernel_twins import AROUND, around, by_blocks, compare, compare_around, core, jnp, outputs_and_gradients, wide

LARGE = {"linear": {"Q": 2}, "ssm": {"R": 4}, "gated-deltanet": {}, "rwkv": {}}


def on_a_gpu() -> list:
    """Mixers, head sizes, dtypes with their gates; rwkv's tiles of 128 in float32 are too large for shared memory, and refused."""
    gates = {"bfloat16": 2e-2, "float32": 5e-6}
    cases = itertools.product(LARGE, (32, 64, 128), gates)
    return [(*case, gates[case[2]]) for case in cases if case != ("rwkv", 128, "float32")]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "size", "dtype", "gate"), on_a_gpu())
def test_on_a_gpu_a_kernel_is_its_twin(name: str, size: int, dtype: str, gate: float):
    """A length that no tile divides; heads and rows are few enough for segments."""
    shape = {"B": 2, "T": 2100, "K": size, "V": 64 if name == "ssm" else size}
    compare(name, None, shape | LARGE[name], True, dtype, gate)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", AROUND)
def test_on_a_gpu_a_kernel_around_a_core_is_its_twin(name: str, dtype: str):
    gate = {"bfloat16": 5e-3, "float32": 1e-6}[dtype]
    compare_around(around(name), {"B": 2, "T": 1100, "K": 64}, True, dtype, gate)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["pallas", "masked"])
def test_on_a_gpu_block_sparse_is_attention_under_the_mask(form: str):
    got, want = (by_blocks(each, 2, 1000, (4, 2), 64, 64, "bfloat16") for each in (form, "plain"))
    demand([Difference(f"array {i}", relative_l2(a, b), 2e-2) for i, (a, b) in enumerate(zip(got, want, strict=True))])
    if form == "pallas":
        assert all((a == b).all() for a, b in zip(got, by_blocks(form, 2, 1000, (4, 2), 64, 64, "bfloat16"), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGE)
def test_on_a_gpu_a_kernel_gives_the_same_bits_every_time(name: str):
    rng, it = np.random.default_rng(0), core(name)
    shape = {"B": 2, "T": 512, "K": 64, "V": 64} | LARGE[name]
    arrays = tuple(jnp.asarray(x, "float32" if i in wide(name) else "bfloat16") for i, x in enumerate(it.arrays(rng, **shape)))
    state = jnp.zeros(it.state(**{key: value for key, value in shape.items() if key != "T"}))
    demand_equal_bits(*(outputs_and_gradients(it.kernel, arrays, state, None) for _ in range(2)))
