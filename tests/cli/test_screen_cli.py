"""The display of a run: on a terminal, and nowhere else; a terminal is left as it was, however a run ends."""

import os
import re
import signal
import time

import pytest

from smedjan_common.reporting.metrics import read_rows
from tests.fakes.display import LINES
from tests.fakes.runs import arguments, saved_steps, start, write_text
from tests.fakes.terminal import Terminal

TRAIN = "tests.fakes.train"
OFTEN = ("--log-every", 5, "--eval-every", 20, "--sample-every", 20, "--sample-tokens", 4, "--checkpoint-every", 20)


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path)


def frames(raw: str) -> int:
    """How often a display was drawn over the one before."""
    return len(re.findall(r"\x1b\[1A\x1b\[2K", raw))


def test_a_terminal_has_a_display_under_the_lines_and_at_the_end_only_lines(text, tmp_path):
    terminal = Terminal(TRAIN, *arguments(text, tmp_path / "run", 60, *OFTEN), SMEDJAN_FAKE="seconds=0.03")
    raw = terminal.read(until="left ")
    assert terminal.end() == 0
    raw = terminal.raw
    assert frames(raw) > 3
    for part in ("━", "step ", "left ", "loss ", "validation ", "bits/byte ", "lr ", "grad ", "tok/s", "mfu ", "memory "):
        assert part in raw
    shown = [line for line in terminal.shown() if line]
    assert not [line for line in shown if "━" in line], "the display is gone"
    assert "next       smedjan chat " in terminal.raw
    assert [line.split()[:2] for line in shown].count(["smedjan", "generate"]) == 1
    assert max(map(len, shown[shown.index(next(line for line in shown if line.startswith("Done"))) :])) < 80 + len(str(tmp_path))
    begins = [line.split()[0] for line in shown]
    assert [begins.count(word) for word in ("Done:", "saved", "compiling", "compiled,")] == [1, 4, 1, 1]
    assert [line for line in shown if line.startswith("step 60/60  loss")]
    assert terminal.is_sane()


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"CI": "true"}, {"TERM": ""}])
def test_a_dumb_terminal_and_ci_have_plain_lines(text, tmp_path, environment):
    terminal = Terminal(TRAIN, *arguments(text, tmp_path / "run", 6), NO_COLOR="1", **environment)
    assert terminal.end() == 0
    assert "\x1b" not in terminal.raw
    assert "━" not in terminal.raw
    assert "Done: 6 steps" in terminal.raw


def test_no_color_takes_the_colours_and_leaves_the_display(text, tmp_path):
    for name, coloured in (("plain", {"NO_COLOR": "1"}), ("coloured", {})):
        terminal = Terminal(TRAIN, *arguments(text, tmp_path / name, 20), SMEDJAN_FAKE="seconds=0.03", **coloured)
        assert terminal.end() == 0
        assert frames(terminal.raw) > 1
        assert bool(re.search(r"\x1b\[[\d;]*3\dm", terminal.raw)) == (name == "coloured")


def test_a_pipe_has_no_code_unless_colours_are_forced(text, tmp_path):
    for name, forced in (("plain", {}), ("forced", {"FORCE_COLOR": "1"})):
        out, err = start(TRAIN, *arguments(text, tmp_path / name, 4), env=forced).communicate(timeout=60)
        assert ("\x1b[" in out) == bool(forced)
        assert "\x1b[1A" not in out, "colours alone"
        assert not err
        assert max(len(line) for line in out.splitlines() if line.startswith("step")) <= 100


def test_a_terminal_that_changes_its_size_shows_no_line_wider_than_it(text, tmp_path):
    terminal = Terminal(TRAIN, *arguments(text, tmp_path / "run", 100, *OFTEN), SMEDJAN_FAKE="seconds=0.03", columns=120)
    terminal.read(until="left ")
    terminal.resize(44)
    time.sleep(0.6)
    terminal.read(until="━")
    begin = len(terminal.raw)
    assert terminal.end() == 0
    drawn = [line for line in re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "\n", terminal.raw[begin:]).splitlines() if "━" in line]
    assert drawn
    assert max(map(len, drawn)) < 44
    assert terminal.is_sane()


def test_ctrl_c_is_said_in_the_display_and_the_end_is_whole(text, tmp_path):
    words = arguments(text, tmp_path / "run", 1000, *OFTEN)
    terminal = Terminal(TRAIN, *words, SMEDJAN_FAKE="seconds=0.05,long_at=30,long=1.5")
    while len(read_rows(tmp_path / "run")) < 6:
        terminal.read(until="\n")
    time.sleep(0.3)
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130
    shown = terminal.shown()
    assert sum(line.startswith("SIGINT: finishing this step") for line in shown) == 1, shown
    [step] = saved_steps(tmp_path / "run")[-1:]
    assert f"Stopped after step {step} of 1000 by SIGINT. The same command goes on from here." in shown
    assert terminal.is_sane()


def test_a_second_ctrl_c_and_an_error_are_said_on_lines_of_their_own(text, tmp_path):
    terminal = Terminal(TRAIN, *arguments(text, tmp_path / "a", 1000), SMEDJAN_FAKE="seconds=0.05,long_at=12,long=30")
    terminal.read(until="step 10/1000")
    time.sleep(0.5)
    for _ in range(2):
        terminal.process.send_signal(signal.SIGINT)
        time.sleep(0.6)
    assert terminal.end(20) == 130
    assert [line for line in terminal.shown() if line.startswith("SIGINT again: stopped at once.")]
    assert terminal.is_sane()
    terminal = Terminal(TRAIN, *arguments(text, tmp_path / "b", 1000), SMEDJAN_FAKE="seconds=0.05,oom_at=14")
    assert terminal.end() == 3
    assert [line for line in terminal.shown() if line.startswith("error: The device ran out of memory.")]
    assert not [line for line in terminal.shown() if "━" in line]
    assert terminal.is_sane()


def test_who_asks_by_a_signal_gets_one_line_and_the_run_goes_on(text, tmp_path):
    process = start(TRAIN, *arguments(text, tmp_path / "run", 80, "--log-every", 5), fake="seconds=0.03")
    while "step 20/80" not in process.stdout.readline():
        assert process.poll() is None
    os.kill(process.pid, signal.SIGUSR1)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    [line] = [line for line in out.splitlines() if re.match(r"step \d+/80  loss \d.*tok/s.*left", line) and "memory" in line]
    assert "lr " in line


def test_what_is_printed_elsewhere_stands_above_the_display(text, tmp_path):
    """A warning on standard error, while the display is drawn."""
    words = arguments(text, tmp_path / "run", 20, "--sample-every", 10)
    terminal = Terminal(TRAIN, *words, SMEDJAN_FAKE="seconds=0.05,nan_logits=1")
    assert terminal.end() == 0
    assert sum(line.startswith("note: no sample: ") for line in terminal.shown()) == 2


def test_lines_and_a_display_of_changing_height_never_mix():
    """Two threads write: the one that prints, and the one that draws."""
    terminal = Terminal("tests.fakes.display")
    assert terminal.end() == 0
    assert frames(terminal.raw) > 20
    assert [line for line in terminal.shown() if line] == [f"line {number}" for number in range(LINES)]
