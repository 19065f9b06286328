"""Losses of pairs in float64: equal to their definitions pair by pair and to TRL's, their weights to finite differences of the loss."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from smedjan_common.training.preferences import LOSSES, METRICS, PREFERENCES, count_pairs, weigh
from tests.fakes.runs import ROOT

OPTIONS = SimpleNamespace(beta=0.3, gamma=0.4, label_smoothing=0.1, nll_weight=0.7)
LN2 = math.log(2)


def softplus(x):
    return math.log1p(math.exp(-abs(x))) + max(x, 0)


def odds(mean):
    return math.log(math.exp(mean) / (1 - math.exp(mean)))


# s_w, s_l, n_w, n_l, r_w, r_l, options -> the loss of a pair without --nll-weight
DEFINITIONS = {
    "dpo": lambda s, o: (1 - o.label_smoothing) * softplus(-o.beta * (s.rw - s.rl)) + o.label_smoothing * softplus(o.beta * (s.rw - s.rl)),
    "ipo": lambda s, o: (s.rw / s.nw - s.rl / s.nl - 1 / (2 * o.beta)) ** 2,
    "simpo": lambda s, o: softplus(-(o.beta * (s.w / s.nw - s.l / s.nl) - o.gamma)),
    "orpo": lambda s, o: o.beta * softplus(-(odds(s.w / s.nw) - odds(s.l / s.nl))),
}


def batch(seed=0):
    """nll, targets, documents and reference of three rows: two pairs, one pair, none."""
    rng = np.random.default_rng(seed)
    documents = np.repeat([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 4], [0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2]], 1, 0)
    documents = np.array([*documents, np.zeros(13, int)])
    targets = rng.integers(0, 50, (3, 13))
    targets[:, 0] = targets[0, 3] = targets[0, 7] = targets[1, 2] = -1
    targets[0, 12] = targets[1, 5:] = targets[2] = -1
    nll = np.where(targets >= 0, rng.gamma(2.0, 1.0, targets.shape), 0.0)
    return nll, targets, documents, -rng.gamma(3.0, 2.0, (3, 4))


def pairs_of(nll, targets, documents, reference):
    """Of each pair a namespace of its sums."""
    for row in range(len(nll)):
        for at in range(0, reference.shape[1], 2):
            where = [(documents[row] == at + side) & (targets[row] >= 0) for side in (0, 1)]
            if not all(part.any() for part in where):
                continue
            (better, nw), (worse, nl) = ((-nll[row][part].sum(), int(part.sum())) for part in where)
            against = {"rw": better - reference[row, at], "rl": worse - reference[row, at + 1]}
            yield SimpleNamespace(w=better, l=worse, nw=nw, nl=nl, **against)


@pytest.mark.parametrize("name", PREFERENCES)
def test_the_loss_is_its_definition_pair_by_pair(name):
    found = list(pairs_of(*batch()))
    assert len(found) == 3
    loss, _, metrics = weigh(np, PREFERENCES[name], *batch(), OPTIONS)
    wanted = sum(DEFINITIONS[name](pair, OPTIONS) - OPTIONS.nll_weight * pair.w / pair.nw for pair in found)
    assert loss == pytest.approx(wanted, rel=1e-13)
    assert count_pairs(np, batch()[1], batch()[2], 4) == 3
    assert tuple(metrics) == METRICS
    assert metrics["logps/chosen"] == pytest.approx(sum(pair.w for pair in found))
    assert metrics["logps/chosen_per_token"] == pytest.approx(sum(pair.w / pair.nw for pair in found))
    if PREFERENCES[name].needs_reference:
        assert metrics["rewards/chosen"] == pytest.approx(0.3 * sum(pair.rw for pair in found))
        assert metrics["rewards/accuracies"] == sum(pair.rw > pair.rl for pair in found)
    else:
        assert metrics["rewards/rejected"] == pytest.approx(0.3 * sum(pair.l / pair.nl for pair in found))
    assert metrics["rewards/margins"] == pytest.approx(metrics["rewards/chosen"] - metrics["rewards/rejected"])


@pytest.mark.parametrize("name", PREFERENCES)
def test_the_weights_are_the_derivatives_of_the_loss(name):
    nll, targets, documents, reference = batch(1)
    _, weights, _ = weigh(np, PREFERENCES[name], nll, targets, documents, reference, OPTIONS)
    assert not weights[targets < 0].any()
    assert not weights[2].any()
    step = 1e-6
    for row, at in zip(*np.nonzero(targets >= 0), strict=True):
        moved = [nll + sign * step * (np.arange(nll.size) == row * nll.shape[1] + at).reshape(nll.shape) for sign in (1, -1)]
        up, down = (weigh(np, PREFERENCES[name], value, targets, documents, reference, OPTIONS)[0] for value in moved)
        assert weights[row, at] == pytest.approx((up - down) / (2 * step), rel=1e-6, abs=1e-9)
    assert (weights[0, 4:7] < 0).all() or name == "ipo", "those of the worse answer push it down"


TRL = json.loads((ROOT / "tests" / "fixtures" / "preferences-trl.json").read_text())  # by tests/trl_preferences.py


@pytest.mark.parametrize("row", TRL["rows"], ids=lambda row: f"{row['objective']}-{len(row['chosen'])}-{len(row['rejected'])}")
def test_losses_and_derivatives_are_those_of_trl(row):
    sizes = len(row["chosen"]), len(row["rejected"])
    nll = -np.array([[0.0, *row["chosen"], 0.0, *row["rejected"]]])
    documents = np.repeat([0, 1], [1 + size for size in sizes])[None]
    targets = np.where(nll != 0, 1, -1)
    options = SimpleNamespace(**{"beta": 0.1, "gamma": 1.0, "label_smoothing": 0.0, "nll_weight": 0.0, **row["options"]})
    loss, weights, _ = weigh(np, PREFERENCES[row["objective"]], nll, targets, documents, np.array([row["reference"]]), options)
    assert loss == pytest.approx(row["loss"], rel=1e-12)
    slopes = [0.0, *row["by_chosen"], 0.0, *row["by_rejected"]]
    np.testing.assert_allclose(-weights[0], slopes, rtol=1e-11, atol=1e-15)


def test_where_nothing_moved_the_loss_is_ln_2_and_no_answer_is_ahead():
    nll, targets, documents, reference = batch()
    for row in range(3):
        reference[row] = [-nll[row][documents[row] == number].sum() for number in range(4)]
    plain = SimpleNamespace(beta=0.1, label_smoothing=0.0, nll_weight=0.0)
    loss, _, metrics = weigh(np, PREFERENCES["dpo"], nll, targets, documents, reference, plain)
    assert loss == pytest.approx(3 * LN2, rel=1e-15)
    assert metrics["rewards/accuracies"] == metrics["rewards/margins"] == 0


def test_a_pair_counts_the_same_wherever_it_is_packed():
    nll, targets, documents, reference = batch()
    alone = np.zeros((3, 13)), np.full((3, 13), -1), np.zeros((3, 13), int), np.zeros((3, 2))
    for row, (source, first) in enumerate(((0, 0), (0, 2), (1, 0))):
        inside = (documents[source] >= first) & (documents[source] <= first + 1)
        alone[0][row, : inside.sum()], alone[1][row, : inside.sum()] = nll[source][inside], targets[source][inside]
        alone[2][row, : inside.sum()] = documents[source][inside] - first
        alone[2][row, inside.sum() :] = 2
        alone[3][row] = reference[source, first : first + 2]
    for loss in PREFERENCES.values():
        packed, single = (weigh(np, loss, *arrays, OPTIONS) for arrays in ((nll, targets, documents, reference), alone))
        assert packed[0] == pytest.approx(single[0], rel=1e-13)
        assert packed[2] == pytest.approx(single[2], rel=1e-12)


@pytest.mark.parametrize("name", PREFERENCES)
@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_nothing_overflows_where_answers_are_certain_or_impossible(name, scale, dtype):
    nll, targets, documents, reference = batch()
    with np.errstate(all="raise", under="ignore"):
        arrays = (nll * scale).astype(dtype), targets, documents, reference.astype(dtype)
        loss, weights, metrics = weigh(np, PREFERENCES[name], *arrays, OPTIONS)
    assert np.isfinite(loss)
    assert np.isfinite(weights).all()
    assert all(np.isfinite(value) for value in metrics.values())


def test_the_flag_of_a_loss_and_the_name_of_its_objective():
    assert {flag: row.name for flag, row in LOSSES.items()} == {"sigmoid": "dpo", "ipo": "ipo", "simpo": "simpo", "orpo": "orpo"}
    assert [row.name for row in PREFERENCES.values() if row.needs_reference] == ["dpo", "ipo"]
