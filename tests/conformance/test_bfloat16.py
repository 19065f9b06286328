"""The gates of the bfloat16 report, which are rounding noise: that they are what noise.py measures, hold for a backend and see a fault."""

import dataclasses
import importlib.util
import os

import numpy as np
import pytest

from bench import bfloat16
from smedjan_common.reference import model as reference
from tests.conformance import checks, noise, subjects
from tests.conformance.cases import CASES
from tests.conformance.compare import Difference, demand, largest

FIRST = "attention-swiglu-mha"


def test_rounded_values_are_neighbours_with_two_bits_less_and_keep_their_mean():
    values = {"a": np.full(200_000, 1.003, np.float32), "exact": np.array([0.0, 1.0, -2.0, 0.375], np.float32)}
    found = noise.rounded(values, 0)
    step = 2.0 ** (noise.FEWER - 7)
    assert set(found["a"].tolist()) == {1.0, 1.0 + step}
    assert abs(found["a"].mean(dtype=np.float64) - 1.003) < 4 * step * np.sqrt(0.1 / 200_000)
    assert np.array_equal(found["exact"], values["exact"])
    assert not np.array_equal(found["a"], noise.rounded(values, 1)["a"])


def test_the_file_of_gates_has_what_is_measured():
    kept = bfloat16.noise()[FIRST]
    logits = {
        seed: reference.forward(CASES[FIRST].model, noise.rounded(CASES[FIRST].params, seed), CASES[FIRST].tokens) for seed in range(2)
    }
    exact = reference.forward(CASES[FIRST].model, CASES[FIRST].params, CASES[FIRST].tokens)
    found = max(largest(each, exact) for each in logits.values())
    assert kept["forward"] / 2 < found <= kept["forward"] * 1.001, "the largest of more draws, these among them"


@pytest.mark.parametrize("name", bfloat16.noise())
def test_feed_forwards_that_are_missing_are_seen(name: str):
    case = CASES[name]
    without = {key: np.zeros_like(value) if ".ffn.down_proj" in key else value for key, value in case.params.items()}
    off = largest(*(reference.forward(case.model, params, case.tokens) for params in (without, case.params)))
    assert off > bfloat16.gate(name, "jax forward", 0)


@pytest.mark.skipif(not importlib.util.find_spec("jax"), reason="MLX takes bfloat16 on a GPU only")
@pytest.mark.parametrize("name", bfloat16.noise() if os.environ.get("SMEDJAN_TEST_FULL") == "1" else [FIRST])
def test_a_backend_in_bfloat16_is_within_its_noise(name: str):
    case = CASES[name]
    train = dataclasses.replace(case.train, dtype="bfloat16")
    exact, rounded = (subjects.loss_and_gradients("jax", case.model, each, case.params, case.batches[0])[1] for each in (case.train, train))
    differences = [
        *checks.forward("jax", dataclasses.replace(case, train=train)),
        *(Difference(f"gradient of {key}", np.linalg.norm(rounded[key] - exact[key]) / np.linalg.norm(exact[key]), 0.0) for key in exact),
    ]
    gates = {True: bfloat16.gate(name, "jax gradients", 0), False: bfloat16.gate(name, "jax forward", 0)}
    demand([each._replace(gate=gates[each.name.startswith("gradient")]) for each in differences])
