"""Trackers get what metrics.jsonl has, also of a run that was stopped, and never harm a run; their files are read back."""

import importlib.util
import json
import subprocess
import sys
import time

import pytest

from smedjan_common.commands import track
from smedjan_common.reporting import trackers
from smedjan_common.reporting.metrics import read_rows
from smedjan_common.reporting.trackers import Start, figures
from smedjan_common.reporting.trackers.thread import WAITING, Tracking
from tests.fakes.events import scalars, texts
from tests.fakes.runs import ROOT, arguments, saved_steps, start, train_here, write_text
from tests.fakes.wandb_file import history

OFTEN = ("--log-every", 3, "--eval-every", 8, "--checkpoint-every", 10, "--sample-every", 10, "--sample-tokens", 4)
needs_tensorboard = pytest.mark.skipif(not importlib.util.find_spec("tensorboardX"), reason="tensorboardX is not installed")


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path)


def expected(run) -> dict:
    """name -> step -> value, of metrics.jsonl."""
    wanted = {}
    for row in read_rows(run):
        for name, value in figures(row).items():
            wanted.setdefault(name, {})[row["step"]] = pytest.approx(value, rel=1e-6)
    return wanted


@needs_tensorboard
def test_tensorboard_has_the_rows_of_a_run_that_died_and_went_on_and_a_replay_has_the_same(text, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    monkeypatch.setenv("SMEDJAN_FAKE", "oom_at=18")
    assert train_here(*arguments(text, run, 30, *OFTEN, "--tracker", "tensorboard")) == 3
    monkeypatch.delenv("SMEDJAN_FAKE")
    time.sleep(1.1)  # the names of event files count seconds
    assert train_here("--checkpoint-dir", run) == 0, "the run remembers its tracker"
    place = run / "trackers" / "tensorboard"
    assert scalars(place) == expected(run)
    shown = texts(place)
    assert json.loads(shown["config", 0].strip("`\n"))["train"]["steps"] == 30
    assert (run / "samples" / "step-00000020.txt").read_text().strip() in shown["sample", 20]
    place.rename(tmp_path / "live")
    capsys.readouterr()
    assert track.main([str(run), "--to", "tensorboard"]) == 0
    out = capsys.readouterr().out
    rows = [row for row in read_rows(run) if "event" not in row]
    assert f"replayed {len(rows)} rows and 3 samples" in out
    assert f"tensorboard --logdir {place}" in out
    assert scalars(place) == expected(run)


@pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="wandb is not installed")
def test_wandb_has_the_rows_offline_by_our_steps_also_of_a_run_that_died_and_went_on(text, tmp_path):
    run = tmp_path / "run"
    words = arguments(text, run, 30, *OFTEN, "--tracker", "wandb")
    for fault, code in (("oom_at=18", 3), ("", 0)):
        process = start("tests.fakes.train", *words, fake=fault, env={"WANDB_MODE": "offline"})
        out, err = process.communicate(timeout=120)
        assert process.returncode == code, err
        assert "note: the tracker" not in out
    files = sorted((run / "trackers" / "wandb" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1, "the same run for wandb"
    got: dict[str, dict] = {}
    for file in files:
        for row in history(file):
            for name in row.keys() & expected(run).keys():
                got.setdefault(name, {})[row["step"]] = row[name]
    assert got == expected(run)


@needs_tensorboard
def test_a_replay_follows_a_run_to_its_end(text, tmp_path):
    run = tmp_path / "run"
    process = start("tests.fakes.train", *arguments(text, run, 60, *OFTEN), fake="seconds=0.04")
    while not saved_steps(run):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    command = [sys.executable, "-m", "smedjan_common.cli", "track", str(run), "--to", "tensorboard", "--follow"]
    followed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert followed.returncode == 0, followed.stderr
    assert process.wait(60) == 0
    assert scalars(run / "trackers" / "tensorboard") == expected(run)
    process.communicate()


class Quiet:
    def start(self, start):
        self.got = []

    def log(self, step, figures):
        self.got.append(step)

    def text(self, step, text):
        self.got.append(text)

    def finish(self, exit_code):
        self.got.append(exit_code)


class Raises(Quiet):
    def log(self, step, figures):
        raise ConnectionError("no route to host\nmore")


class Hangs(Quiet):
    def log(self, step, figures):
        time.sleep(3600)


class Exits(Quiet):
    def start(self, start):
        sys.exit("give an API key")


@pytest.mark.parametrize(("kind", "says"), [(Raises, "ConnectionError: no route to host)"), (Exits, "SystemExit: give an API key)")])
def test_a_tracker_that_fails_costs_one_line(text, tmp_path, monkeypatch, capsys, kind, says):
    monkeypatch.setattr("smedjan_common.reporting.trackers.thread.make_tracker", lambda name: kind())
    monkeypatch.setattr("smedjan_common.run.checks.check_trackers", lambda names: None)
    assert train_here(*arguments(text, tmp_path / "run", 20, "--log-every", 1, "--tracker", "wandb")) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "the tracker wandb" in line]
    assert len(lines) == 1
    assert lines[0].startswith("note: the tracker wandb has not all of this run")
    assert says in lines[0]
    assert len(read_rows(tmp_path / "run")) == 21


def tracking(kind, told):
    made = []

    def make():
        made.append(kind())
        return made[-1]

    return Tracking("x", make, Start("id", ROOT, ROOT, 0, {}), told.append), made


def test_a_tracker_that_hangs_is_waited_for_no_longer_than_said_and_what_waits_for_it_is_bounded():
    told: list[str] = []
    hanging, _ = tracking(Hangs, told)
    begun = time.monotonic()
    for step in range(WAITING + 500):
        hanging.log({"step": step, "loss": 1.0})
    assert time.monotonic() - begun < 2
    assert len(told) == 1
    assert "too slow" in told[0]
    hanging.finish(0, patience=0.2)
    assert time.monotonic() - begun < 4
    assert len(told) == 1, "it is said once"
    other: list[str] = []
    late, _ = tracking(Hangs, other)
    late.log({"step": 1, "loss": 1.0})
    late.finish(0, patience=0.2)
    assert len(other) == 1
    assert "0.2 s after the end" in other[0]


def test_all_arrives_in_order_and_only_what_is_known():
    told: list[str] = []
    working, made = tracking(Quiet, told)
    for step in range(20):
        working.log({"step": step, "loss": 1.0, "mfu": None})
    working.log({"step": 20, "mfu": None})
    working.text(20, "a text")
    working.finish(130)
    assert made[0].got == [*range(20), "a text", 130]
    assert not told
    assert figures({"step": 3, "loss": 2.0, "mfu": None, "unknown": 5}) == {"train/loss": 2.0}


@pytest.mark.parametrize(("name", "says"), [("tensorbord", "Did you mean tensorboard?"), ("trackio", "pip install trackio")])
def test_a_tracker_that_is_unknown_or_not_installed_is_refused_before_anything(text, tmp_path, monkeypatch, capsys, name, says):
    found = importlib.util.find_spec
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda package: None if package == "trackio" else found(package))
    assert train_here(*arguments(text, tmp_path / "run", 2, "--tracker", name)) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert train_here(*arguments(text, tmp_path / "run", 2, "--tracker", "none")) == 0
    assert not (tmp_path / "run" / "trackers").exists()


def test_what_is_no_run_is_not_replayed(tmp_path, capsys):
    for path, says in ((tmp_path / "nothing", "There is no such folder."), (tmp_path, "It holds no run.")):
        assert track.main([str(path), "--to", "tensorboard"]) == 2
        assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
