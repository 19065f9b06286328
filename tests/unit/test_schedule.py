"""Learning-rate schedules: warm-up, shape, floor and end, as closed forms of the step."""

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from smedjan_common.config import TrainConfig
from smedjan_common.training.schedule import SCHEDULES, learning_rate


def config(schedule: str, **changes: float) -> TrainConfig:
    return TrainConfig(**{"steps": 100, "batch_size": 1, "seq_len": 1, "lr": 2.0, "warmup": 10, "lr_schedule": schedule, **changes})


# schedule -> {step: factor of the peak}, with 100 steps, 10 of warm-up, floor 0.1, the last fifth decaying
POINTS = {
    "cosine": {10: 1.0, 55: 0.55, 100: 0.1, 32: 0.1 + 0.45 * (1 + math.cos(math.pi * 22 / 90))},
    "linear": {10: 1.0, 55: 0.55, 100: 0.1, 37: 1 - 0.9 * 0.3},
    "wsd": {10: 1.0, 55: 1.0, 79: 1.0, 80: 1.0, 90: 0.55, 95: 0.325, 100: 0.1},
    "invsqrt": {10: 1.0, 20: math.sqrt(1 / 2), 40: 0.5, 90: 1 / 3, 100: math.sqrt(1 / 10), 1000: math.sqrt(1 / 10)},
    "constant": {10: 1.0, 55: 1.0, 99: 1.0, 100: 1.0},
}


def test_every_schedule_is_tested():
    assert POINTS.keys() == SCHEDULES.keys()


@pytest.mark.parametrize("schedule", POINTS)
def test_a_schedule_goes_through_its_points(schedule: str):
    for step, factor in POINTS[schedule].items():
        assert learning_rate(config(schedule), step) == pytest.approx(2.0 * factor, rel=1e-12), step


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_rises_linearly_to_the_peak_and_never_starts_at_zero(schedule: str):
    assert [learning_rate(config(schedule), step) for step in range(10)] == pytest.approx([0.2 * (step + 1) for step in range(10)])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warm_up_the_first_step_has_the_peak(schedule: str):
    assert learning_rate(config(schedule, warmup=0), 0) == 2.0


@given(
    schedule=st.sampled_from(list(SCHEDULES)),
    steps=st.integers(1, 300),
    warmup=st.integers(0, 300),
    floor=st.floats(0, 1),
    fraction=st.just(0.0) | st.floats(1e-9, 1),
    step=st.integers(0, 400),
    peak=st.floats(1e-6, 10),
)
@example(schedule="wsd", steps=1, warmup=0, floor=0.0, fraction=0.001, step=1, peak=2.0)  # was -1.8e-15
@example(schedule="wsd", steps=300, warmup=0, floor=0.3, fraction=1e-9, step=300, peak=2.0)
@example(schedule="cosine", steps=300, warmup=105, floor=0.1, fraction=0.2, step=104, peak=3e-4)  # 3e-4 * 105 / 105 is above 3e-4
def test_any_setting_stays_between_floor_and_peak_and_never_rises_after_warm_up(schedule, steps, warmup, floor, fraction, step, peak):
    run = config(schedule, steps=steps, warmup=min(warmup, steps - 1), lr=peak, min_lr_ratio=floor, decay_fraction=fraction)
    run.validate()
    rate, following = learning_rate(run, step), learning_rate(run, step + 1)
    assert 0 <= rate <= peak
    if step >= run.warmup:
        assert rate >= peak * floor
        assert following <= rate + 1e-12
    if step >= steps:
        assert following == rate


def test_invsqrt_falls_by_the_steps_since_the_start_over_the_warm_up_and_stops_at_the_floor():
    run = config("invsqrt", steps=10_000)
    for step in range(10, 1000, 90):
        assert learning_rate(run, step) == pytest.approx(2.0 * math.sqrt(10 / step), rel=1e-12)
    assert learning_rate(run, 1001) == learning_rate(run, 9_000) == 2.0 * 0.1


@given(steps=st.integers(2, 200), fraction=st.floats(0.01, 1))
def test_wsd_holds_the_peak_until_the_last_fraction_of_the_run(steps: int, fraction: float):
    run = config("wsd", steps=steps, warmup=0, decay_fraction=fraction)
    for step in range(steps + 1):
        into = max(0.0, (step - steps * (1 - fraction)) / (steps * fraction))
        assert learning_rate(run, step) == pytest.approx(2.0 * (1 - 0.9 * min(into, 1)), rel=1e-9)
