"""How long a run will take: from where it is known, and that it is said; the table of the heading keeps its width."""

import dataclasses
import json
import re

import pytest

from smedjan_common.backend import Device
from smedjan_common.reporting.pace import ENOUGH, Pace
from smedjan_common.reporting.table import as_table
from tests.fakes.bigram import BigramBackend
from tests.fakes.runs import arguments, train_here, write_text


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path)


def time_of(capsys, *words, backend=BigramBackend) -> str:
    assert train_here(*words, "--dry-run", backend=backend) == 0
    return re.search(r"^time     (.*(\n {9}.*)*)", capsys.readouterr().out, re.MULTILINE)[1].replace("\n         ", " ")


def on(**changes):
    class Elsewhere(BigramBackend):
        def describe(self) -> Device:
            return dataclasses.replace(super().describe(), **changes)

    return Elsewhere


def test_a_new_run_on_a_cpu_is_measured(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SMEDJAN_FAKE", "seconds=0.05")
    said = time_of(capsys, *arguments(text, tmp_path / "run", 1000))
    seconds = int(re.match(r"about (\d+)s by 3 steps that were measured, 0\.0\d+ s each", said)[1])
    assert 50 <= seconds <= 59


def test_a_step_too_large_to_try_and_one_without_memory_are_not_known(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("smedjan_common.run.expected.PROBED", 1e6)
    said = time_of(capsys, *arguments(text, tmp_path / "run", 1000))
    assert said.startswith("not known: a step is 7.")
    assert "MFLOP" in said
    monkeypatch.undo()
    monkeypatch.setenv("SMEDJAN_FAKE", "oom_at=2")
    assert time_of(capsys, *arguments(text, tmp_path / "run", 10)) == "not known: a step found too little memory"


def test_a_gpu_goes_by_its_data_sheet_which_is_said_to_be_assumed(text, tmp_path, capsys):
    said = time_of(capsys, *arguments(text, tmp_path / "run", 1000), backend=on(kind="gpu", peak_flops=1e6))
    assert said.endswith("at 40 % of the device's data sheet, assumed; the run measures it")
    hours, minutes = map(int, re.match(r"about (\d+)h(\d+)m", said).groups())
    assert hours + minutes / 60 == pytest.approx(1000 * 7.2e6 / 0.4e6 / 3600, rel=0.1)


def test_a_run_that_goes_on_goes_by_its_own_rows_on_the_same_device(text, tmp_path, capsys):
    run = tmp_path / "run"
    assert train_here(*arguments(text, run, 10, "--log-every", 2)) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    slow = [row | ({"tokens_per_second": 64.0} if row.get("tokens_per_second") else {}) for row in rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in slow))
    words = ("--checkpoint-dir", run, "--steps", 40)
    capsys.readouterr()
    assert time_of(capsys, *words) == "about 30s at the speed of its steps so far"
    assert "measured" in time_of(capsys, *words, backend=on(name="another abacus"))
    assert train_here(*words[:2], "--steps", 12) == 0
    assert "\ntime     about 2s at the speed of its steps so far\n" in capsys.readouterr().out, "the heading has it too"


def test_the_table_is_80_columns_wide_in_a_pipe_and_breaks_no_path(text, tmp_path, capsys):
    deep = tmp_path / ("a-long-name-" * 8) / "run"
    assert train_here(*arguments(text, deep, 4)) == 0
    out = capsys.readouterr().out
    table = out[out.index("device ") : out.index("compiling")].splitlines()
    assert all(len(line) <= 80 or str(deep) in line for line in table)
    assert as_table([("name", "word " * 40)]).splitlines()[1].startswith(" " * 5 + "word")


def test_time_left_is_the_median_of_recent_steps_and_what_comes_beside_them():
    pace = Pace(100, {"evaluating": 10, "saving": 0, "sampling": 50})
    for at in range(ENOUGH):
        pace.stepped(float(at))
        assert pace.left(at + 1) is None, "the first steps say nothing"
    pace.stepped(100.0)  # one odd step
    pace.stepped(101.0)
    assert pace.left(10) == 90.0, "an evaluation was not measured yet"
    pace.spent["evaluating"], pace.times["evaluating"] = 6.0, 2
    assert pace.left(10) == 90 + 9 * 3.0
    assert pace.left(95) == 5 + 1 * 3.0
    assert pace.left(100) is None
    pace.spent["saving"], pace.times["saving"] = 50.0, 1
    assert pace.left(95) == 8.0, "what is not done on the way costs nothing"
    with pace.spending("sampling"):
        pass
    before = len(pace.recent)
    pace.stepped(500.0)
    assert len(pace.recent) == before, "what came between is no step"
