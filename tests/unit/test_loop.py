"""The loop with the bigram backend: what is logged, when it waits, that a resumed run is the same run, what stops it."""

import dataclasses
import json
import math
import shutil
import time

import numpy as np
import pytest

import smedjan_common.run.folder
from smedjan_common.checkpoint import read_checkpoint
from smedjan_common.commands import info
from smedjan_common.config import ModelConfig
from smedjan_common.data.token_file import TokenFile
from smedjan_common.errors import CheckpointError
from smedjan_common.model.flops import train_flops_per_token
from smedjan_common.model.params import draw
from smedjan_common.reporting.metrics import EVAL_KEYS, TRAIN_KEYS, eval_rows, read_rows, train_rows
from smedjan_common.run.loop import IN_FLIGHT
from smedjan_common.tokenizer import Tokenizer
from tests.fakes.bigram import BigramBackend, bigram_loss
from tests.fakes.runs import arguments, arrays, figures, saved_steps, train_here, tree, write_text


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path)


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def test_rows_have_exactly_the_keys_of_the_design_and_first_and_last_step_are_logged(text, run):
    assert train_here(*arguments(text, run, 25, "--log-every", 10, "--eval-every", 20)) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in train_rows(rows)] == [1, 10, 20, 25]
    assert [row["step"] for row in eval_rows(rows)] == [20, 25]
    assert all(tuple(row) == TRAIN_KEYS for row in train_rows(rows))
    assert all(tuple(row) == EVAL_KEYS for row in eval_rows(rows))
    assert [row["tokens"] for row in train_rows(rows)] == [step * 4 * 16 for step in (1, 10, 20, 25)]


def test_log_every_0_logs_the_first_and_the_last_step(text, run):
    assert train_here(*arguments(text, run, 12, "--log-every", 0, "--eval-every", 0)) == 0
    assert [row["step"] for row in train_rows(read_rows(run))] == [1, 12]


def test_the_loss_of_a_row_is_the_mean_of_the_steps_since_the_row_before(text, tmp_path):
    for name, every in (("all", 1), ("some", 4)):
        assert train_here(*arguments(text, tmp_path / name, 10, "--log-every", every, "--eval-every", 0)) == 0
    batches = [row["batch_loss"] for row in train_rows(read_rows(tmp_path / "all"))]
    assert [row["loss"] for row in train_rows(read_rows(tmp_path / "all"))] == batches
    rows = train_rows(read_rows(tmp_path / "some"))
    assert [row["batch_loss"] for row in rows] == [batches[step - 1] for step in (1, 4, 8, 10)]
    means = [sum(batches[begin:end]) / (end - begin) for begin, end in ((0, 1), (1, 4), (4, 8), (8, 10))]
    assert [row["loss"] for row in rows] == means


@pytest.mark.parametrize("extra", [None, {}, {"loss_since_line": None}, {"loss_since_line": {"total": "9", "steps": -1}}])
def test_a_checkpoint_without_the_running_sum_goes_on_with_a_new_one(text, run, monkeypatch, extra):
    write = smedjan_common.run.folder.write_checkpoint
    monkeypatch.setattr(
        "smedjan_common.run.folder.write_checkpoint",
        lambda folder, snapshot, about, **more: write(folder, snapshot, dataclasses.replace(about, extra=extra), **more),
    )
    assert train_here(*arguments(text, run, 20, "--log-every", 4, "--checkpoint-every", 6, "--eval-every", 0, "--keep", 0)) == 0
    shutil.rmtree(run / "final")
    for step in (20, 18, 12):
        shutil.rmtree(run / f"step-{step:08d}")
    whole = train_rows(read_rows(run))
    assert train_here("--checkpoint-dir", run) == 0
    again = train_rows(read_rows(run))
    assert [row["batch_loss"] for row in again] == [row["batch_loss"] for row in whole]
    assert [row["loss"] == before["loss"] for row, before in zip(again, whole, strict=True)] == [True, True, False, True, True, True]


def test_a_figure_that_is_not_known_is_null_and_mfu_is_flops_over_peak(text, run):
    train_here(*arguments(text, run, 20))
    first, *others = train_rows(read_rows(run))
    assert first["tokens_per_second"] is None, "the first step compiles: its time is no speed"
    assert first["mfu"] is None
    model = read_checkpoint(run).model
    for row in others:
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * train_flops_per_token(model, 16) / 1e9)
        assert row["peak_memory_bytes"] == 4096
    assert [row["elapsed_seconds"] for row in (first, *others)] == sorted(row["elapsed_seconds"] for row in (first, *others))


def test_it_learns(text, run):
    train_here(*arguments(text, run, 60))
    rows = train_rows(read_rows(run))
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_are_read_one_step_late_and_the_queue_is_bounded(text, run):
    made = []

    class Recorded(BigramBackend):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    train_here(*arguments(text, run, 40, "--log-every", 10, "--eval-every", 0), backend=Recorded)
    events = made[-1].events  # the first was asked only whether there is room
    at = {event: place for place, event in enumerate(events)}
    assert at[("read", 20)] > at[("dispatch", 21)], "a log row waits for no step that is not overtaken"
    assert at[("read", 20)] < at[("dispatch", 22)], "a log row comes one step late, not later"
    waiting = np.cumsum([1 if kind == "dispatch" else -1 for kind, _ in events])
    assert 2 <= waiting.max() <= IN_FLIGHT + 1
    assert [step for kind, step in events if kind == "read"] == list(range(1, 41)), "every step is checked, in order"


def test_a_run_that_died_and_went_on_is_the_same_run(text, run, tmp_path, monkeypatch):
    flags = ("--checkpoint-every", 10, "--log-every", 3, "--eval-every", 8, "--grad-accum", 2)
    assert train_here(*arguments(text, tmp_path / "whole", 30, *flags)) == 0
    monkeypatch.setenv("SMEDJAN_FAKE", "oom_at=18")
    assert train_here(*arguments(text, run, 30, *flags)) == 3
    assert [row["step"] for row in train_rows(read_rows(run))][-1] == 15, "there are rows past the checkpoint of step 10"
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 18, "loss": 1.')  # a line torn by the death
    monkeypatch.delenv("SMEDJAN_FAKE")
    assert train_here(*arguments(text, run, 30, *flags)) == 0
    assert figures(run) == figures(tmp_path / "whole")
    assert arrays(run) == arrays(tmp_path / "whole")


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("nan_at=17", "The loss is nan at step 17"),
        ("grad_nan_at=17", "is inf at step 17"),
        ("nan_at=20", "The loss is nan at step 20"),  # a step at which a checkpoint is due
    ],
)
def test_a_loss_or_gradient_that_is_not_finite_ends_the_run_and_is_not_saved(text, run, monkeypatch, capsys, fault, what):
    monkeypatch.setenv("SMEDJAN_FAKE", fault)
    assert train_here(*arguments(text, run, 30, "--checkpoint-every", 5)) == 4
    error = capsys.readouterr().err
    assert what in error
    assert "step-00000015" in error, "the newest good checkpoint is named"
    assert saved_steps(run) == [5, 10, 15]
    assert all(math.isfinite(row["loss"]) for row in train_rows(read_rows(run)))


def test_out_of_memory_is_exit_3_with_advice(text, run, monkeypatch, capsys):
    monkeypatch.setenv("SMEDJAN_FAKE", "oom_at=1")
    assert train_here(*arguments(text, run, 3)) == 3
    assert "--batch-size" in capsys.readouterr().err


def test_the_same_command_after_the_end_says_done_and_more_steps_go_on(text, run, capsys):
    train_here(*arguments(text, run, 10))
    before = tree(run)
    assert train_here(*arguments(text, run, 10)) == 0
    assert "Done already" in capsys.readouterr().out
    assert tree(run) == before, "nothing was touched"
    assert train_here(*arguments(text, run, 14)) == 0
    assert "steps: 10 in the checkpoint, 14 now" in capsys.readouterr().out
    assert saved_steps(run) == [10, 14]
    assert read_checkpoint(run / "final").step == 14


def test_keep_and_final(text, run):
    train_here(*arguments(text, run, 12, "--checkpoint-every", 3, "--keep", 2))
    assert saved_steps(run) == [9, 12]
    final = read_checkpoint(run / "final")
    assert final.snapshot.optimizer == {}
    assert {n: a.tobytes() for n, a in final.snapshot.params.items()}.items() <= arrays(run).items()


def test_validation_is_the_mean_over_the_file_and_bits_per_byte_count_its_bytes(text, run):
    train_here(*arguments(text, run, 5, "--eval-batches", 1000))
    row = eval_rows(read_rows(run))[-1]
    val = TokenFile.open(next(run.glob("data/*/val.bin")))
    tokens = np.asarray(val.tokens, np.int64)
    loss, _ = bigram_loss(read_checkpoint(run).snapshot.params["embed.weight"], tokens[:-1], tokens[1:])
    assert row["val_loss"] == pytest.approx(loss, rel=1e-5)
    num_bytes = Tokenizer.load(run / "final").token_bytes()[tokens[1:]].sum()
    assert row["val_bits_per_byte"] == pytest.approx(loss * (len(tokens) - 1) / math.log(2) / num_bytes, rel=1e-5)


def test_evaluation_does_not_depend_on_grad_accum(text, tmp_path):
    for parts in (1, 2):
        train_here(*arguments(text, tmp_path / str(parts), 5, "--grad-accum", parts, "--eval-batches", 3))
    one, two = (eval_rows(read_rows(tmp_path / str(parts)))[-1]["val_loss"] for parts in (1, 2))
    assert one == pytest.approx(two, rel=1e-6)


def test_samples_go_to_the_console_and_the_run_folder(text, run, capsys):
    train_here(*arguments(text, run, 6, "--sample-every", 3, "--sample-prompt", "the cat", "--sample-tokens", 9))
    samples = sorted((run / "samples").iterdir())
    assert [path.name for path in samples] == ["step-00000003.txt", "step-00000006.txt"]
    assert samples[0].read_text().startswith("the cat")
    assert "  | the cat" in capsys.readouterr().out


def test_pretrained_starts_at_step_0_from_the_weights(text, run, tmp_path):
    train_here(*arguments(text, run, 40))
    new = tmp_path / "new"
    assert (
        train_here("--pretrained", run, "--dataset", text, "--checkpoint-dir", new, "--steps", 2, "--batch-size", 4, "--seq-len", 16) == 0
    )
    assert train_rows(read_rows(new))[0]["step"] == 1
    assert train_rows(read_rows(new))[0]["loss"] < train_rows(read_rows(run))[0]["loss"] * 0.8
    assert read_checkpoint(new).model == read_checkpoint(run).model


def test_the_digest_of_the_initial_values_is_recorded_once_and_a_run_that_goes_on_draws_none(text, run, tmp_path, monkeypatch, capsys):
    assert train_here(*arguments(text, run, 4)) == 0
    config = json.loads((run / "config.json").read_text())
    digest = draw(ModelConfig.from_dict(config["model"]), config["train"]["seed"])[1]
    assert config["initial_values"] == digest
    monkeypatch.setattr("smedjan_common.run.loop.draw", lambda *_: pytest.fail("drawn"))
    assert train_here("--checkpoint-dir", run, "--steps", 6) == 0
    assert train_here("--checkpoint-dir", tmp_path / "copy", "--resume", run, "--steps", 8) == 0
    for folder in (run, tmp_path / "copy"):
        capsys.readouterr()
        assert info.main([str(folder)]) == 0
        assert ["initial", "values", digest] in [line.split() for line in capsys.readouterr().out.splitlines()]
    words = ("--dataset", text, "--checkpoint-dir", tmp_path / "new", "--steps", 2, "--batch-size", 4, "--seq-len", 16)
    assert train_here("--pretrained", run, *words) == 0
    assert json.loads((tmp_path / "new" / "config.json").read_text())["initial_values"] is None


def test_a_dry_run_writes_nothing(text, run, tmp_path, capsys):
    before = tree(tmp_path)
    assert train_here(*arguments(text, run, 10, "--dry-run")) == 0
    assert tree(tmp_path) == before
    assert not run.exists()
    assert "nothing was written" in capsys.readouterr().out


def test_a_validation_loss_that_is_not_finite_is_told_once_and_null_in_the_rows(text, run, monkeypatch, capsys):
    monkeypatch.setenv("SMEDJAN_FAKE", "val_nan=1")
    assert train_here(*arguments(text, run, 6, "--eval-every", 2)) == 0
    assert [(row["step"], row["val_loss"]) for row in read_rows(run) if "val_loss" in row] == [(2, None), (4, None), (6, None)]
    lines = [line for line in capsys.readouterr().out.splitlines() if "validation loss" in line]
    assert len(lines) == 1
    assert lines[0].startswith("note: the validation loss of step 2 is not finite")


def test_no_row_is_faster_than_its_steps_where_dispatching_computes(text, run, monkeypatch):
    """As MLX on a CPU does: a step that was complete before the one before it was read seemed to take no time."""
    monkeypatch.setenv("SMEDJAN_FAKE", "seconds=0.1")
    assert train_here(*arguments(text, run, 6, "--log-every", 1, "--eval-every", 3)) == 0
    speeds = [row["tokens_per_second"] for row in train_rows(read_rows(run))[1:]]
    assert len(speeds) == 5
    assert max(speeds) <= 4 * 16 / 0.1


def test_checkpoints_are_written_while_training_goes_on_one_at_a_time(text, run, monkeypatch):
    events, saved, write = [], {}, smedjan_common.run.folder.write_checkpoint

    class Recorded(BigramBackend):
        def train_step(self, state, *batch):
            events.append(("step", state["step"] + 1))
            saved[state["step"]] = state["params"]["embed.weight"].copy()
            return super().train_step(state, *batch)

    def slowly(folder, snapshot, about, **metrics):
        events.append(("begin", snapshot.step))
        while snapshot.step == 4 and ("step", 6) not in events:
            time.sleep(0.01)
        path = write(folder, snapshot, about, **metrics)
        events.append(("end", snapshot.step))
        return path

    monkeypatch.setattr("smedjan_common.run.folder.write_checkpoint", slowly)
    monkeypatch.setenv("SMEDJAN_FAKE", "seconds=0.02")
    assert train_here(*arguments(text, run, 12, "--checkpoint-every", 4, "--keep", 0), backend=Recorded) == 0
    at = {event: place for place, event in enumerate(events)}
    assert at[("begin", 4)] < at[("step", 6)] < at[("end", 4)], "a step waits for no write"
    assert at[("end", 4)] < at[("begin", 8)] < at[("end", 8)] < at[("begin", 12)], "one write at a time"
    assert saved_steps(run) == [4, 8, 12]
    for step in (4, 8):
        written = read_checkpoint(run / f"step-{step:08d}").snapshot.params["embed.weight"]
        assert np.array_equal(written, saved[step]), "it is the state of its step, though training went on"


def test_a_write_that_fails_ends_the_run_and_what_was_saved_before_stays(text, run, monkeypatch, capsys):
    write = smedjan_common.run.folder.write_checkpoint

    def fails_at_8(folder, snapshot, about, **metrics):
        if snapshot.step == 8:
            raise CheckpointError("The checkpoint could not be written.", "No space left on device.", "Free some space.")
        return write(folder, snapshot, about, **metrics)

    monkeypatch.setattr("smedjan_common.run.folder.write_checkpoint", fails_at_8)
    monkeypatch.setenv("SMEDJAN_FAKE", "seconds=0.02")
    assert train_here(*arguments(text, run, 1000, "--checkpoint-every", 4, "--log-every", 1)) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert saved_steps(run) == [4]
    assert train_rows(read_rows(run))[-1]["step"] < 30, "it ends at the step after the failure, not at the end"


def test_an_error_of_a_step_waits_for_the_checkpoint_being_written(text, run, monkeypatch, capsys):
    write = smedjan_common.run.folder.write_checkpoint

    def slowly(*args, **metrics):
        time.sleep(0.5)
        return write(*args, **metrics)

    monkeypatch.setattr("smedjan_common.run.folder.write_checkpoint", slowly)
    monkeypatch.setenv("SMEDJAN_FAKE", "oom_at=6")
    assert train_here(*arguments(text, run, 20, "--checkpoint-every", 5)) == 3
    assert saved_steps(run) == [5]
    assert f"saved {run / 'step-00000005'}" in capsys.readouterr().out


def test_keep_every_keeps_its_steps_for_ever(text, run):
    assert train_here(*arguments(text, run, 13, "--checkpoint-every", 2, "--keep", 2, "--keep-every", 4)) == 0
    assert saved_steps(run) == [4, 8, 12, 13]
    assert train_here("--checkpoint-dir", run, "--steps", 18) == 0, "both flags are remembered"
    assert saved_steps(run) == [4, 8, 12, 16, 18]
