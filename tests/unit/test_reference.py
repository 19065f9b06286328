"""The reference is to be trusted: its derivatives do not depend on the step, its loss and norm have known values."""

import math

import numpy as np
import pytest

from smedjan_common.reference import model as reference
from smedjan_common.reference.derivative import STEP, directional_derivative
from smedjan_common.reference.loss import cross_entropy, mean_cross_entropy
from smedjan_common.reference.norm import rms_norm
from smedjan_common.reference.optim import clip_by_global_norm, global_norm
from tests.conformance.cases import CASES, DEFAULT_CASES, Case
from tests.conformance.conftest import FULL

ROUNDING = 1e-9  # of a quarter of the step, whatever the slope: some tensors of the router or of a decay hardly move the loss


@pytest.mark.parametrize("key", DEFAULT_CASES)
def test_slopes_of_the_loss_do_not_depend_on_the_step(key: str):
    """A quarter of the step changes no slope by 3e-8 of the gradient's size: less than a hundredth of the gate.

    Three tensors of every mixer and feed-forward; `make test-full` takes all.
    """
    case: Case = CASES[key]
    params = {name: value.astype(np.float64) for name, value in case.params.items()}
    rng = np.random.default_rng(0)
    looked_at = set(params) if FULL else three_of_each(case)
    for name, value in params.items():
        direction, *others = rng.standard_normal((5, *value.shape))
        if name not in looked_at:
            continue
        slopes = [directional_derivative(lambda p: loss_of(case, p), params, name, direction, STEP * scale) for scale in (0.25, 1.0)]
        others = [directional_derivative(lambda p: loss_of(case, p), params, name, other) for other in others]
        size = np.sqrt(np.mean(np.square([*others, slopes[1]])))  # of a slope along a random direction: the gradient's norm
        assert max(slopes) - min(slopes) < 3e-8 * size + ROUNDING, name


def three_of_each(case: Case) -> set[str]:
    """The first, the middle and the last tensor of every mixer and feed-forward, in one layer, and the others of that layer."""
    model, groups, chosen = case.model, {}, set()
    for name in case.params:
        layer, _, rest = name.removeprefix("layers.").partition(".")
        part, kind = rest.partition(".")[0], name
        if layer.isdecimal():
            kind = {"mixer": model.mixer_of, "ffn": model.ffn_of}.get(part, lambda layer, part=part: part)(int(layer))
        groups.setdefault(kind, {}).setdefault(layer, []).append(name)
    for layers in groups.values():
        names = next(iter(layers.values()))
        chosen |= {names[place] for place in (0, len(names) // 2, -1)}
    return chosen


def loss_of(case: Case, params: dict[str, np.ndarray]) -> float:
    return reference.loss(case.model, params, *case.batches[0])


def test_rounding_the_parameters_moves_no_gradient_near_its_gate():
    """What half a unit in the last place of every parameter does in float64 no float32 backend can be better than.

    The gradients of linear's two decay biases are small sums that cancel, the worst conditioned ones that were measured.
    """
    case, rng = CASES["linear-swiglu-gqa"], np.random.default_rng(0)
    exact = {name: value.astype(np.float64) for name, value in case.params.items()}
    for name in (name for name in exact if name.endswith("decay_bias")):
        expected = gradient_of(case, exact, name)
        rounded = ({key: value * (1 + 2.0**-24 * rng.uniform(-1, 1, value.shape)) for key, value in exact.items()} for _ in range(8))
        moved = [np.linalg.norm(gradient_of(case, params, name) - expected) for params in rounded]
        assert np.sqrt(np.mean(np.square(moved))) < 0.25 * case.tolerance.gradient * np.linalg.norm(expected), name


def gradient_of(case: Case, params: dict[str, np.ndarray], name: str) -> np.ndarray:
    """The whole gradient of a small vector."""
    axes = np.eye(params[name].size)
    return np.array([directional_derivative(lambda p: loss_of(case, p), params, name, axis) for axis in axes])


def test_the_slope_of_a_known_function():
    params = {"x": np.array([1.0, 2.0, 3.0]), "y": np.array([5.0])}
    direction = np.array([1.0, -2.0, 0.5])
    slope = directional_derivative(lambda p: float(np.exp(p["x"]).sum() * p["y"][0]), params, "x", direction)
    assert slope == pytest.approx(5 * float(np.exp(params["x"]) @ direction), rel=1e-10)


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary():
    logits, targets = np.zeros((2, 3, 64)), np.array([[0, 5, -1], [63, -1, -1]])
    assert cross_entropy(logits, targets) == (pytest.approx(3 * math.log(64)), 3)
    assert mean_cross_entropy(logits + 1e4, targets) == pytest.approx(math.log(64))
    assert mean_cross_entropy(logits, np.full((2, 3), -1)) == 0.0


def test_a_norm_has_unit_mean_square_times_its_weight():
    x = np.random.default_rng(0).standard_normal((4, 32)) * 7
    assert np.mean(rms_norm(x, np.full(32, 2.0), 0.0) ** 2, axis=-1) == pytest.approx(4.0)
    assert rms_norm(np.zeros((1, 8)), np.ones(8), 1e-5) == pytest.approx(0.0)


def test_clipping_scales_only_what_is_too_long():
    grads = {"a": np.array([3.0]), "b": np.array([[4.0]])}
    assert global_norm(grads) == 5.0
    for limit, expected in ((1.0, 1.0), (5.0, 5.0), (9.0, 5.0), (0.0, 5.0)):
        clipped, before = clip_by_global_norm(grads, limit)
        assert before == 5.0
        assert global_norm(clipped) == pytest.approx(expected)
