"""metrics.jsonl survives what happens to runs; the console's figures; the plot."""

import io
import json
import sys

import pytest

from smedjan_common.reporting.console import count, counted, duration, flop, lasted, printable, size, step_line
from smedjan_common.reporting.curves import AXES, Curve, apart, limits, smoothed
from smedjan_common.reporting.meter import Meter, Span
from smedjan_common.reporting.metrics import TRAIN_KEYS, MetricsFile, read_rows, resumed
from smedjan_common.reporting.plot import Look, is_drawn_here, plot
from smedjan_common.reporting.progress import progress_bar
from smedjan_common.streams import has_colours, is_live

ROW = dict.fromkeys(TRAIN_KEYS, None) | {"loss": 2.5, "lr": 1e-3, "grad_norm": 0.5}


def rows(*steps):
    return [ROW | {"step": step, "tokens": step * 64} for step in steps]


def write(folder, *steps):
    file = MetricsFile(folder, 0)
    for row in rows(*steps):
        file.write(row)
    file.close()


def test_a_row_is_in_the_file_when_write_returns(tmp_path):
    file = MetricsFile(tmp_path, 0)
    file.write(rows(1)[0])
    assert read_rows(tmp_path) == rows(1)
    file.close()


def test_going_on_drops_later_rows_and_keeps_each_step_once(tmp_path):
    write(tmp_path, 1, 10, 20, 30)
    file = MetricsFile(tmp_path, 20)
    file.write(rows(30)[0])
    file.close()
    assert read_rows(tmp_path) == rows(1, 10, 20, 30)


@pytest.mark.parametrize("torn", ['{"step": 40, "lo', "{", '{"step": 40}garbage', "\x00\x00\x00", "7", "\udcff", "[" * 9999])
def test_a_torn_last_line_is_dropped_and_the_next_row_stands_on_its_own_line(tmp_path, torn):
    write(tmp_path, 1, 10)
    with open(tmp_path / "metrics.jsonl", "a", errors="surrogateescape") as out:
        out.write(torn)
    assert read_rows(tmp_path) == rows(1, 10)
    file = MetricsFile(tmp_path, 10)
    file.write(rows(20)[0])
    file.close()
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == rows(1, 10, 20)


@pytest.mark.parametrize(
    "edited",
    ['"loss": 5', '"tokens": 9, "loss": "low"', '"tokens": 9, "loss": NaN', '"val_loss": 1e999', f'"tokens": 1{"0" * 400}, "loss": 5'],
)
def test_a_row_that_was_edited_by_hand_is_left_out_wherever_rows_are_read(tmp_path, edited):
    write(tmp_path, 1, 10)
    with open(tmp_path / "metrics.jsonl", "a") as out:
        out.write(f'{{"step": 11, {edited}}}\n')
    assert read_rows(tmp_path) == rows(1, 10)
    plot({"training": Curve(read_rows(tmp_path))}, tmp_path / "loss.png")
    MetricsFile(tmp_path, 20).close()


def test_no_figure_that_is_not_json_is_written(tmp_path):
    file = MetricsFile(tmp_path, 0)
    with pytest.raises(ValueError, match="JSON"):
        file.write(ROW | {"step": 1, "loss": float("nan")})
    file.close()


def test_a_folder_without_metrics_has_no_rows(tmp_path):
    assert read_rows(tmp_path) == []


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (950, "950"),
        (12345, "12.3k"),
        (1_110_000, "1.11M"),
        (45_101_568, "45.1M"),
        (999_999, "1M"),
        (999.7, "1k"),
        (6.5e9, "6.5B"),
        (2.5e15, "2500T"),
    ],
)
def test_count(value, shown):
    assert count(value) == shown


def test_floating_point_operations_have_the_prefixes_of_physics():
    shown = ("512 FLOP", "13 MFLOP", "798 GFLOP", "1 TFLOP", "2.5 PFLOP", "9000 EFLOP")
    assert tuple(flop(value) for value in (512, 13e6, 798.2e9, 999.9e9, 2.5e15, 9e21)) == shown


def test_one_of_a_thing_and_many():
    assert [counted(number, "document") for number in (0, 1, 2048)] == ["0 documents", "1 document", "2,048 documents"]


@pytest.mark.parametrize(("value", "shown"), [(5, "5s"), (59.6, "1m00s"), (130, "2m10s"), (3 * 3600 + 300, "3h05m"), (187200, "2d04h")])
def test_duration(value, shown):
    assert duration(value) == shown


@pytest.mark.parametrize(("value", "shown"), [(512, "512 B"), (3 << 19, "1.5 MiB"), (80 << 30, "80.0 GiB")])
def test_size(value, shown):
    assert size(value) == shown


def test_what_a_model_writes_cannot_steer_a_terminal():
    assert printable("a\x1b[31mb\x07c\x9b2Jd\r\x00\x7f\n\té雪") == "a\ufffd[31mb\ufffdc\ufffd2Jd\ufffd\ufffd\ufffd\n\té雪"


def test_short_times_have_a_digit_more():
    assert [lasted(value) for value in (0.04, 9.94, 9.96, 75)] == ["0.0s", "9.9s", "10s", "1m15s"]


@pytest.mark.parametrize(
    ("environment", "terminal", "live", "coloured"),
    [
        ({}, True, True, True),
        ({}, False, False, False),
        ({"CI": "true"}, True, False, True),
        ({"CI": "false"}, True, True, True),
        ({"TERM": "dumb"}, True, False, False),
        ({"TERM": ""}, True, False, False),
        ({"NO_COLOR": "1"}, True, True, False),
        ({"FORCE_COLOR": "1"}, False, False, True),
        ({"FORCE_COLOR": "0"}, False, False, False),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, True, True, False),
    ],
)
def test_what_a_stream_may_be_given(monkeypatch, environment, terminal, live, coloured):
    for name, value in ({"TERM": "xterm", "CI": "", "NO_COLOR": "", "FORCE_COLOR": ""} | environment).items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    stream.isatty = lambda: terminal  # type: ignore[method-assign]
    assert (is_live(stream), has_colours(stream)) == (live, coloured)
    stream.close()
    del stream.isatty
    assert not is_live(stream)


def test_a_step_is_one_line_and_unknown_figures_are_left_out():
    line = step_line(rows(12)[0], 1000, None)
    assert line == "step   12/1000  loss 2.5000  lr 1.00e-03  grad 0.50"
    full = step_line(rows(12)[0] | {"tokens_per_second": 12300.0, "mfu": 0.341}, 1000, 130)
    assert full.endswith("12.3k tok/s  mfu 34.1 %  left 2m10s")


def test_smoothed_of_a_line_is_the_line_and_of_noise_is_less_noise():
    line = [0.5 * i for i in range(100)]
    assert smoothed(line) == pytest.approx(line)
    zigzag = [float(i % 2) for i in range(200)]
    assert max(smoothed(zigzag)[5:-5]) < 0.7


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
@pytest.mark.parametrize("made", [[], [1], range(1, 200)])
def test_plots_of_any_length_are_drawn_whole(tmp_path, suffix, made):
    evaluation = [{"step": 1, "val_loss": 2.6, "val_bits_per_byte": 1.0}] if made else []
    plot({"training": Curve(rows(*made) + evaluation), "other": Curve(rows(*made))}, tmp_path / f"x.{suffix}", "a title")
    assert [path.name for path in tmp_path.iterdir()] == [f"x.{suffix}"]
    assert (tmp_path / f"x.{suffix}").stat().st_size > 1000
    assert is_drawn_here(tmp_path / f"x.{suffix}")


def test_a_title_that_the_font_cannot_draw_warns_nobody(tmp_path, recwarn):
    plot({"training": Curve([{"step": 1, "tokens": 8, "loss": 2.0}])}, tmp_path / "loss.png", "run \N{FOX FACE}")
    assert not recwarn.list


def test_a_terminal_gets_a_bar_and_a_pipe_nothing(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("CI", raising=False)
    for stream, says in ((Terminal(), ["count", "merge", "5/10", "7/7"]), (io.StringIO(), [])):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar("steps") as show:
            show("count", 5, 10)
            show("merge", 7, 7)
        assert all(part in stream.getvalue() for part in says)
        assert bool(stream.getvalue()) == bool(says)


# steps of a second each, when they are dispatched and read: the next one is dispatched before a step is read
QUEUED = [(Span(0, 0), Span(0, 1)), (Span(0, 0), Span(1, 2)), (Span(1, 1), Span(2, 3)), (Span(2, 2), Span(3, 4))]
COMPUTED = [(Span(0, 1), Span(2, 2)), (Span(1, 2), Span(3, 3)), (Span(2, 3), Span(4, 4)), (Span(3, 4), Span(4, 4))]


@pytest.mark.parametrize("steps", [QUEUED, COMPUTED], ids=["queued", "computed while dispatching"])
def test_the_speed_of_each_step_is_that_of_its_own_second(steps):
    meter = Meter(64, step=10, since=0.0)
    assert [meter.lap(step, *spans) for step, spans in enumerate(steps, 11)] == [64] * 4


def test_several_steps_between_two_rows_share_their_time():
    for steps in (QUEUED, COMPUTED):
        meter = Meter(64, step=10, since=0.0)
        assert [meter.lap(step, *steps[step - 11]) for step in (12, 14)] == [64, 64]


def test_a_pause_and_the_first_step_have_no_speed():
    meter = Meter(64)
    assert meter.lap(1, Span(0, 5), Span(5, 6)) is None
    meter.start(1, at=6.0)
    with meter.paused():
        pass
    meter.since += 10  # as long as a pause of ten seconds
    assert meter.lap(2, Span(16, 16), Span(16, 17)) == pytest.approx(64, rel=1e-3)


def made(*losses, **more):
    return [
        ROW | {"step": 10 * at, "tokens": 640 * at, "loss": loss, "elapsed_seconds": 2.0 * at, **more} for at, loss in enumerate(losses, 1)
    ]


def test_what_is_between_rows_stands_between_them_on_every_axis():
    curve = Curve([*made(5.0, 4.0, 3.0), {"step": 25, "val_loss": 3.5, "val_bits_per_byte": 1.0}, resumed(15, "mlx", "jax")], 2.0)
    assert [curve.xs(curve.checks, axis) for axis in AXES] == [[25], [1600], [3200], [5.0]]
    assert [curve.xs(curve.events, axis) for axis in AXES] == [[15], [960], [1920], [3.0]]
    assert curve.xs([{"step": 40}], "tokens") == [2560], "past the last row it is as fast as before"
    assert curve.series("loss", "time") == ([2.0, 4.0, 6.0], [5.0, 4.0, 3.0])
    assert [Curve(made(5.0)).has(axis) for axis in AXES] == [True, True, False, True]


def test_the_first_steps_do_not_flatten_the_rest_and_what_must_be_seen_is():
    low, high = limits([9.0, 8.0, *[3.0 - at / 1000 for at in range(200)]], [], 0.96)
    assert 2.7 < low < 2.9
    assert 3.0 <= high < 3.3
    assert limits([3.0, 2.0], [7.0], 0.96)[1] > 7.0
    assert limits([], [], 1.0) is None
    assert limits([2.0], [], 1.0) == (1.9, 2.1)


def test_labels_are_moved_apart_and_keep_their_order():
    found = apart([0.5, 0.5, 0.51, 0.9], 0.05)
    assert all(b - a > 0.0499 for a, b in zip(sorted(found), sorted(found)[1:], strict=False))
    assert found[3] == pytest.approx(0.9)
    assert sum(found[:3]) / 3 == pytest.approx(0.503, abs=0.01)


@pytest.mark.parametrize(("axis", "log"), zip(AXES, ("none", "x", "y", "xy"), strict=True))
def test_every_look_is_drawn_with_marks_of_what_happened(tmp_path, axis, log):
    happened = [resumed(200, "mlx", "jax"), {"step": 300, "event": "resumed"}, {"step": 310, "event": 7}]
    curve = Curve([*made(*(9 / at for at in range(1, 60)), tokens_per_second=9.0), *happened], 6.0)
    plot({"training": curve, "b": Curve(made(4.0), 6.0)}, tmp_path / "x.svg", "a", Look(axis, 0.0, log))
    drawn = (tmp_path / "x.svg").read_text()
    assert drawn.count("<!-- resumed -->") == 1
    assert drawn.count("<!-- jax \N{RIGHTWARDS ARROW} mlx -->") == 1


def test_a_run_that_goes_on_again_from_the_same_step_tells_it_once(tmp_path):
    file = MetricsFile(tmp_path, 0)
    for row in (*made(5.0, 4.0), resumed(20, "jax", "jax")):
        file.write(row)
    file.close()
    MetricsFile(tmp_path, 20).close()
    assert read_rows(tmp_path) == made(5.0, 4.0)
