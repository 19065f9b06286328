"""Each filter against its definition, and what sampling promises: the same draw for the same (seed, position), the right shares."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from smedjan_common.errors import ConfigError, NotFiniteError
from smedjan_common.inference.sampling import PENALTIES, Sampling, filtered, gumbel, min_p, penalize, probabilities, sample, top_k, top_p

logits = arrays(np.float64, st.integers(1, 40), elements=st.floats(-20, 20).map(lambda x: round(x, 1)))  # rounded: with ties


def kept(scores):
    return set(np.flatnonzero(np.isfinite(scores)).tolist())


@given(logits, st.integers(1, 50))
def test_top_k_keeps_the_k_largest_ties_to_the_smaller_id(scores, k):
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    assert kept(top_k(scores, k)) == set(order[:k])


@given(logits, st.floats(0.01, 0.99))
def test_top_p_keeps_the_fewest_most_probable_that_sum_to_p(scores, p):
    chances = probabilities(scores)
    order, total, expected = sorted(range(len(scores)), key=lambda i: (-scores[i], i)), 0.0, set()
    for token in order:
        if total >= p:
            break
        expected.add(token)
        total += chances[token]
    assert kept(top_p(scores, p)) == expected
    assert sum(chances[token] for token in expected) >= p - 1e-12


@given(logits, st.floats(0.01, 1))
def test_min_p_keeps_what_is_probable_enough_beside_the_best(scores, share):
    chances = probabilities(scores)
    ratio = chances / chances.max()
    got = kept(min_p(scores, share))
    assert {i for i in range(len(scores)) if ratio[i] > share * (1 + 1e-9)} <= got
    assert got <= {i for i in range(len(scores)) if ratio[i] > share * (1 - 1e-9)}


@given(logits, st.lists(st.integers(0, 60), max_size=20), st.floats(1.01, 3))
def test_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens_once(scores, history, penalty):
    got = penalize(scores, history, penalty)
    for token, before in enumerate(scores):
        expected = before if token not in history else before / penalty if before > 0 else before * penalty
        assert got[token] == expected


@given(logits, st.integers(0, 9), st.floats(0.05, 1), st.floats(0, 1))
def test_filters_never_leave_nothing_and_never_change_what_they_keep(scores, k, p, share):
    got = filtered(scores, Sampling(top_k=k, top_p=p, min_p=share))
    assert kept(got)
    assert int(np.argmax(scores)) in kept(got)
    assert all(got[token] == scores[token] for token in kept(got))


@given(logits, st.integers(0, 2**63), st.integers(0, 10**6))
def test_a_draw_is_a_function_of_its_arguments_and_never_a_filtered_token(scores, seed, position):
    how = Sampling(temperature=0.7, top_k=3, seed=seed)
    token = sample(scores, [], how, position)
    assert token == sample(scores.astype(np.float64).copy(), [], how, position)
    assert token in kept(top_k(scores, 3))


@given(logits)
def test_temperature_0_is_the_largest_logit_whatever_the_seed(scores):
    assert {sample(scores, [], Sampling(temperature=0, seed=seed), seed) for seed in range(3)} == {int(np.argmax(scores))}


@given(logits, st.sampled_from([5e-324, 1e-320, 1e-310, 1e-307]))
def test_a_tiny_temperature_is_greedy_up_to_ties(scores, temperature):
    for how in (Sampling(temperature), Sampling(temperature, top_k=5, top_p=0.9, min_p=0.1)):
        assert scores[sample(scores, [], how, 3)] == scores.max()


@given(logits, st.floats(1e-3, 10))
def test_an_ordinary_temperature_divides_and_nothing_else(scores, temperature):
    expected = int(np.argmax(scores / temperature + gumbel(np.arange(len(scores)), 5, 2)))
    assert sample(scores, [], Sampling(temperature, seed=5), 2) == expected


def test_draws_have_the_shares_of_softmax():
    scores, how = np.array([1.0, 0.0, 2.0, -1.0]), Sampling(temperature=0.5, seed=3)
    counts = np.bincount([sample(scores, [], how, position) for position in range(20000)], minlength=4)
    assert np.abs(counts / 20000 - probabilities(scores / 0.5)).max() < 0.012


def test_noise_differs_by_seed_and_position_and_is_frozen():
    eight = np.arange(8)
    assert not np.array_equal(gumbel(eight, 0, 0), gumbel(eight, 0, 1))
    assert not np.array_equal(gumbel(eight, 0, 0), gumbel(eight, 1, 0))
    np.testing.assert_array_equal(gumbel(eight, 0, 5), gumbel(np.arange(20), 0, 5)[:8])
    np.testing.assert_allclose(gumbel(eight[:3], 7, 11), FROZEN, rtol=1e-12)


FROZEN = [-0.14801852811660726, -0.60960147565881, 1.4367097085970417]


WRONG = (
    ("temperature", -1.0),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("top_k", -1),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("top_p", float("nan")),
    ("min_p", 2.0),
    ("min_p", float("nan")),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", 1e-320),
    ("repetition_penalty", 1e300),
    ("repetition_penalty", float("nan")),
    ("seed", -1),
    ("presence_penalty", 2.1),
    ("frequency_penalty", float("nan")),
)


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}"):
        Sampling(**{name: value}).validate()


@pytest.mark.parametrize("bias", [100.5, float("nan"), float("-inf")])
def test_a_bias_out_of_range_is_refused(bias):
    with pytest.raises(ConfigError, match="logit_bias of token 7"):
        Sampling(logit_bias=((3, 1.0), (7, bias))).validate()


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1.0, 1e308])
def test_the_farthest_values_that_are_taken_leave_the_largest_logits_finite(penalty, temperature):
    scores = np.array([3e38, -3e38, 0.0, 1.0], np.float32)
    assert np.isfinite(penalize(scores.astype(np.float64), [0, 1, 2, 3], penalty)).all()
    how = Sampling(temperature, top_p=5e-324, min_p=1.0, repetition_penalty=penalty)
    how.validate()
    assert sample(scores, [0, 1, 2], how, 0) == 0


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("logits", [[1.0, np.nan, 2.0], [1.0, np.inf], [-np.inf, -np.inf]])
def test_logits_that_are_not_finite_are_an_error_and_no_token(logits, temperature):
    with pytest.raises(NotFiniteError, match="largest logit of token 7"):
        sample(np.array(logits), [], Sampling(temperature=temperature), 7)


def test_a_token_without_a_chance_is_no_error():
    assert sample(np.array([-np.inf, 0.0]), [], Sampling(), 0) == 1


def test_biases_and_penalties_of_what_was_generated_move_logits_as_their_formulas_say():
    logits, history = np.array([1.0, 2.0, 3.0, 2.5]), [2, 2, 1, 2, 1, 1]  # the first two were given
    choose = lambda prompt_length=2, **how: sample(logits, history, Sampling(temperature=0, **how), 6, prompt_length)  # noqa: E731
    assert choose() == 2
    assert choose(logit_bias=((2, -100.0),)) == 3, "a ban"
    assert choose(logit_bias=((0, 2.1),)) == 0
    assert choose(presence_penalty=0.6) == 3, "3 - 0.6 < 2.5"
    assert choose(presence_penalty=0.4) == 2
    assert choose(frequency_penalty=0.4) == 2, "it was generated once; the prompt does not count"
    assert choose(0, frequency_penalty=0.4) == 3, "three times, were all of it generated"
    assert choose(presence_penalty=-2, frequency_penalty=-2) == 1, "three times: 2 + 8"
    assert choose(repetition_penalty=3, logit_bias=((2, 6.0),)) == 2, "(3 + 6) / 3: the bias comes first"
    assert choose(None, presence_penalty=2) == 2, "all of it was given"
