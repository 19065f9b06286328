"""The table of objectives, and what a formula of it must be: weights that are the derivatives of its loss."""

import numpy as np
import pytest

from smedjan_common.training.objectives import OBJECTIVES, Rows
from tests.fakes.objectives import PAIRED, train

FORMULAS = [row for row in (PAIRED, *OBJECTIVES.values()) if row.formula]


def rows(seed: int = 0) -> Rows:
    """Two rows of two pairs of documents; some tokens do not count, and the rest of a row is no document."""
    rng = np.random.default_rng(seed)
    documents = np.array([[0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 4], [0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3]])
    targets = rng.integers(0, 9, documents.shape)
    targets[:, [0, 5]] = targets[0, -1] = -1
    nll = np.where(targets >= 0, rng.uniform(0.2, 4, documents.shape), 0.0)
    return Rows(nll, targets, documents, -rng.uniform(1, 6, (2, 4)))


@pytest.mark.parametrize("row", FORMULAS, ids=lambda row: row.name)
def test_weights_are_the_derivatives_of_the_loss(row):
    given, config = rows(), train(row.name)
    weights, h = row.formula(np, given, config).weights, 1e-5
    for place in np.ndindex(given.nll.shape):
        sides = []
        for sign in (1, -1):
            moved = given.nll.copy()
            moved[place] += sign * h
            sides.append(float(row.formula(np, given._replace(nll=moved), config).loss))
        slope = (sides[0] - sides[1]) / (2 * h) if given.targets[place] >= 0 else 0.0
        assert weights[place] == pytest.approx(slope, abs=1e-8), place
    assert (weights < 0).any() or row.unit == "tokens"


@pytest.mark.parametrize("row", FORMULAS, ids=lambda row: row.name)
def test_what_a_formula_gives_adds_up_over_rows(row):
    given, config = rows(), train(row.name)
    whole, parts = row.formula(np, given, config), []
    for at in range(2):
        parts.append(row.formula(np, Rows(*(None if part is None else part[at : at + 1] for part in given)), config))
    assert float(whole.loss) == pytest.approx(sum(float(part.loss) for part in parts), rel=1e-12)
    np.testing.assert_allclose(whole.weights, np.concatenate([part.weights for part in parts]), rtol=1e-12)
    assert whole.metrics.keys() == set(row.metrics)
    for name in row.metrics:
        assert float(whole.metrics[name]) == pytest.approx(sum(float(part.metrics[name]) for part in parts), rel=1e-12)


@pytest.mark.parametrize("row", OBJECTIVES.values(), ids=lambda row: row.name)
def test_a_row_says_what_it_needs(row):
    assert OBJECTIVES[row.name] is row
    assert (row.formula is None) <= (not row.metrics and not row.needs_reference and row.units is None)
    assert row.unit == "tokens" or row.units
