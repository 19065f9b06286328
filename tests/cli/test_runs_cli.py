"""`runs`, and `info` of a folder of runs: what each has reached, from its files alone."""

import json
import shutil

import pytest

from smedjan_common.commands import info, runs
from smedjan_common.reporting.metrics import eval_rows, read_rows, train_rows
from tests.fakes.runs import arguments, train_here, write_text


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """runs/: done (12 of 12 steps), stopped (the same run, its last rows and final/ gone)."""
    folder = tmp_path_factory.mktemp("runs")
    words = ("--eval-every", 4, "--log-every", 2, "--checkpoint-every", 0)
    assert train_here(*arguments(write_text(folder), folder / "runs" / "done", 12, *words)) == 0
    stopped = shutil.copytree(folder / "runs" / "done", folder / "runs" / "stopped")
    shutil.rmtree(stopped / "final")
    (stopped / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in read_rows(stopped) if row["step"] <= 6))
    return folder / "runs"


def listed(capsys, *words):
    assert runs.main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_each_run_is_a_line_with_what_it_has_reached(made, capsys):
    done, stopped = listed(capsys, made)
    rows = read_rows(made / "done")
    assert (done["run"], done["finished"], done["step"], done["steps"]) == (str(made / "done"), True, 12, 12)
    assert (stopped["finished"], stopped["step"], stopped["steps"]) == (False, 6, 12)
    assert (done["tokens"], done["loss"]) == (12 * 4 * 16, train_rows(rows)[-1]["loss"])
    assert done["best_val_loss"] == min(row["val_loss"] for row in eval_rows(rows))
    assert (done["mixer"], done["parameters"] > 0) == (["attention"], True)


def test_the_best_validation_is_not_the_last(made, tmp_path, capsys):
    run = shutil.copytree(made / "done", tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "val_loss": 99.0, "val_bits_per_byte": 9.0}\n')
    [found] = listed(capsys, run)
    assert (found["step"], found["best_val_step"]) == (13, 12)


def test_the_table_has_a_line_for_each_run_and_columns_that_line_up(made, capsys):
    assert runs.main([str(made)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1:3] for line in lines] == [["finished", "12/12"], ["unfinished", "6/12"]]
    assert {len(line) for line in lines} == {len(head)}


def test_runs_and_folders_of_them_are_named_side_by_side_and_runs_is_the_default(made, capsys, monkeypatch):
    monkeypatch.chdir(made.parent)
    assert [run["run"] for run in listed(capsys)] == ["runs/done", "runs/stopped"]
    assert [run["run"] for run in listed(capsys, "runs/stopped", "runs")] == ["runs/stopped", "runs/done", "runs/stopped"]


@pytest.mark.parametrize(
    "config",
    [
        '{"versions": {"smedjan": "1"}}',
        '{"versions": {"smedjan": "1"}, "model": [], "train": []}',
        '{"versions": {"smedjan": 1}, "model": {"dim": 7}}',
    ],
)
def test_a_run_whose_config_says_nothing_hides_no_other(made, tmp_path, capsys, config):
    folder = shutil.copytree(made, tmp_path / "runs")
    (folder / "done" / "config.json").write_text(config)
    broken, good = listed(capsys, folder)
    assert (broken["step"], broken["steps"], broken["parameters"], broken["finished"]) == (12, None, None, False)
    assert good["parameters"] > 0
    assert runs.main([str(folder)]) == 0
    assert " 12/- " in capsys.readouterr().out


def test_a_run_that_has_not_begun_has_dashes(made, tmp_path, capsys):
    run = shutil.copytree(made / "stopped", tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    assert runs.main([str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[1:4] == ["unfinished", "0/12", "-"]


def test_info_of_a_folder_of_runs_is_the_same_table(made, capsys):
    assert runs.main([str(made)]) == 0
    table = capsys.readouterr().out
    assert info.main([str(made)]) == 0
    assert capsys.readouterr().out == table
    assert info.main([str(made), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["runs"]) == ("folder of runs", listed(capsys, made))


def test_info_verifies_one_run_at_a_time(made, capsys):
    assert info.main([str(made), "--verify"]) == 2
    assert f"smedjan info {made / 'done'} --verify" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "told"), [("nowhere", "There is no folder"), ("done/data", "There is no run in"), ("../text.txt", "no folder")]
)
def test_where_there_is_no_run_it_says_so(made, capsys, place, told):
    assert runs.main([str(made / place)]) == 2
    assert told in capsys.readouterr().err
