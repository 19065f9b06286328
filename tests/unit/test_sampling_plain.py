"""`sample` takes the token that its plain form (tests/plain_sampling.py) takes: its filters and its noise are the same, bit for bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smedjan_common.inference.sampling import PENALTIES, Sampling, filtered, gumbel, penalize, sample
from tests.plain_sampling import plain_filtered, plain_gumbel, plain_penalize, plain_sample

# few different values: ties everywhere; -inf: tokens without a chance; the ends of float32
values = st.one_of(st.integers(-3, 3).map(float), st.floats(-20, 20), st.sampled_from([-np.inf, 3e38, -3e38, 0.0, -0.0, 1e-300]))
some_logits = st.lists(values, min_size=1, max_size=60).filter(lambda row: max(row) > -np.inf).map(np.array)
settings_of_it = st.builds(
    Sampling,
    temperature=st.one_of(st.sampled_from([0.0, 1.0, 0.7, 5e-324, 1e-310, 1e-3, 1e308]), st.floats(0.05, 5)),
    top_k=st.integers(0, 70),
    top_p=st.one_of(st.sampled_from([1.0, 1 - 2**-53, 5e-324, 0.5]), st.floats(0.01, 1)),
    min_p=st.one_of(st.sampled_from([0.0, 1.0, 5e-324]), st.floats(0, 1)),
    repetition_penalty=st.one_of(st.sampled_from([1.0, *PENALTIES]), st.floats(0.5, 2)),
    seed=st.integers(0, 2**64 - 1),
)


@settings(max_examples=1000)
@given(some_logits, st.lists(st.integers(0, 80), max_size=20), settings_of_it, st.integers(0, 10**6))
@pytest.mark.filterwarnings("ignore:overflow")  # of 3e38 and 1e-300 in one row: in both forms
def test_every_setting_takes_the_token_of_the_plain_form(logits, history, sampling, position):
    assert sample(logits, history, sampling, position) == plain_sample(logits, history, sampling, position)
    np.testing.assert_array_equal(filtered(logits, sampling), plain_filtered(logits, sampling))
    np.testing.assert_array_equal(penalize(logits, history, 1.3), plain_penalize(logits, history, 1.3))


GRID = [  # what people write, and combinations of it
    Sampling(temperature, top_k, top_p, min_p, penalty, seed=temperature_at * 1000 + top_k)
    for temperature_at, temperature in enumerate((0.0, 0.6, 1.0))
    for top_k, top_p, min_p in (
        (0, 1.0, 0.0),
        (1, 1.0, 0.0),
        (50, 1.0, 0.0),
        (0, 0.9, 0.0),
        (0, 0.999999, 0.0),
        (0, 1.0, 0.05),
        (40, 0.95, 0.02),
    )
    for penalty in (1.0, 1.2)
]


@pytest.mark.parametrize("rounding", ["bfloat16", "none"])  # rows of a real size have ties in bfloat16
@pytest.mark.parametrize(("size", "rows"), [(257, 30), (4096, 12), (32768, 2)])
def test_whole_vocabularies_take_the_token_of_the_plain_form(size, rows, rounding):
    random = np.random.default_rng(size)
    for row in range(rows):
        logits = (random.standard_normal(size) * random.uniform(0.01, 6)).astype(np.float32)
        if rounding == "bfloat16":
            logits = (logits.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        history = random.integers(0, size, 300).tolist()
        for sampling in GRID:
            assert sample(logits, history, sampling, row) == plain_sample(logits, history, sampling, row)


def test_top_p_adds_up_to_the_same_bits():
    """A --top-p that is one of the sums exactly: the token there is left out, and is not where a sum is less by its last bit."""
    random = np.random.default_rng(3)
    for _ in range(200):
        scores = random.standard_normal(300) * 3
        weights = np.exp(scores - scores.max())
        sums = np.cumsum(np.sort(weights / weights.sum())[::-1])
        for p in sums[:-1][:: random.integers(5, 40)].tolist():
            np.testing.assert_array_equal(filtered(scores, Sampling(top_p=p)), plain_filtered(scores, Sampling(top_p=p)))


@given(
    st.lists(st.integers(0, 200_000), min_size=1, max_size=40, unique=True).map(sorted), st.integers(0, 2**64 - 1), st.integers(0, 10**6)
)
@settings(max_examples=30)
def test_the_noise_of_an_id_does_not_depend_on_which_others_are_asked_for(ids, seed, position):
    np.testing.assert_array_equal(gumbel(np.array(ids), seed, position), plain_gumbel(200_001, seed, position)[ids])


@pytest.mark.parametrize("few", [True, False])
def test_noise_is_the_same_whether_the_stream_is_read_or_skipped(few, monkeypatch):
    monkeypatch.setattr("smedjan_common.inference.sampling._SKIP", 0 if few else 10**9)
    for ids in ([0], [3], [4], [0, 1, 2, 3, 4, 7, 8, 9, 15, 400, 403, 404], [5, 6, 100_000]):
        np.testing.assert_array_equal(gumbel(np.array(ids), 9, 4), plain_gumbel(ids[-1] + 1, 9, 4)[ids])
