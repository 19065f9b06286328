"""Evaluations, samples and checkpoints: a few in a run of any length, or what the flags say."""

import pytest

from smedjan_common.reporting.metrics import eval_rows, read_rows
from smedjan_common.run.cadence import CADENCES, interval
from tests.fakes.runs import SMALL, arguments, saved_steps, train_here, write_text


@pytest.mark.parametrize("name", CADENCES)
@pytest.mark.parametrize("steps", [1, 3, 17, 320, 12_345, 10**6])
def test_there_are_a_few_in_a_run_of_any_length(name, steps):
    every = interval(name, None, steps)
    assert 1 <= every <= steps
    times = sum(step % every == 0 or step == steps for step in range(1, steps + 1)) if steps < 20_000 else -(-steps // every)
    most = CADENCES[name].times
    assert times <= most + 1 or every == CADENCES[name].most, "no more than that, but where a crash would cost too much"
    assert times >= min(steps, most) // 2


@pytest.mark.parametrize("given", [0, 7, 5000])
def test_what_is_given_counts(given):
    assert [interval(name, given, 100) for name in CADENCES] == [given] * len(CADENCES)


def samples(run):
    return [int(path.stem.removeprefix("step-")) for path in sorted((run / "samples").iterdir())]


def test_a_run_that_says_nothing_is_evaluated_sampled_and_saved_and_goes_on_at_the_pace_of_its_new_length(tmp_path, capsys):
    run = tmp_path / "run"
    words = (*SMALL.split(), "--dataset", write_text(tmp_path), "--checkpoint-dir", run, "--steps")
    assert train_here(*words, 30, "--keep", 0) == 0
    assert [row["step"] for row in eval_rows(read_rows(run))] == [*range(3, 31, 3)]
    assert saved_steps(run) == [*range(3, 31, 3)]
    assert samples(run) == [*range(6, 31, 6)]
    assert train_here("--checkpoint-dir", run, "--steps", 60) == 0
    assert saved_steps(run)[10:] == [*range(36, 61, 6)]
    capsys.readouterr()
    assert train_here("--checkpoint-dir", run, "--steps", 70, "--eval-every", 35) == 0
    assert "note: eval_every: 6 in the run, 35 now" in capsys.readouterr().out


def test_a_sample_that_has_no_memory_costs_the_sample_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SMEDJAN_FAKE", "decode_oom=1")
    assert train_here(*arguments(write_text(tmp_path), tmp_path / "run", 5, "--sample-every", 3)) == 0
    assert "note: no sample: The device ran out of memory." in capsys.readouterr().out
