"""`--ema`: a run keeps an average of its weights, validates it and writes it to final/, and goes on exactly."""

import json
import shutil

import numpy as np
import pytest

from smedjan_common import cli
from smedjan_common.checkpoint import read_checkpoint, read_info
from smedjan_common.commands import eval, generate
from smedjan_common.model.params import initial_params
from tests.fakes.bigram import load
from tests.fakes.runs import arguments, arrays, figures, train_here, write_text

EMA = ("--ema", 0.9, "--eval-every", 2, "--checkpoint-every", 3)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A text, and a run of 6 steps that kept an average."""
    folder = tmp_path_factory.mktemp("averages")
    assert train_here(*arguments(write_text(folder), folder / "run", 6, *EMA)) == 0
    return folder


def test_final_has_the_average_and_says_so_and_step_checkpoints_have_both(place, capsys):
    step, final = read_checkpoint(place / "run/step-00000006"), read_checkpoint(place / "run/final")
    average = step.snapshot.optimizer["ema.embed.weight"]
    assert not np.array_equal(average, step.snapshot.params["embed.weight"])
    np.testing.assert_array_equal(final.snapshot.params["embed.weight"], average)
    assert (final.info.extra["averaged"], final.train.ema, step.info.extra.get("averaged")) == (0.9, 0.9, None)


def test_the_average_is_that_of_the_weights_of_every_step(place, tmp_path):
    text, average, decays = place / "text.txt", None, [min(0.9, (1 + t) / (10 + t)) for t in range(6)]
    assert train_here(*arguments(text, tmp_path / "a", 6, "--checkpoint-every", 1, "--keep", 0)) == 0
    params = [read_checkpoint(tmp_path / f"a/step-{step:08d}").snapshot.params["embed.weight"] for step in range(1, 7)]
    first = read_checkpoint(place / "run/step-00000003").snapshot
    assert np.array_equal(first.params["embed.weight"], params[2]), "training itself is the same"
    average = initial_params(read_info(place / "run").model, 0)["embed.weight"].astype(np.float64)
    for decay, value in zip(decays, params, strict=True):
        average = decay * average + (1 - decay) * value
    np.testing.assert_allclose(read_checkpoint(place / "run/final").snapshot.params["embed.weight"], average, atol=1e-6)


def test_a_run_that_stopped_goes_on_to_the_same_bits_without_the_flag(place, tmp_path):
    text = place / "text.txt"
    assert train_here(*arguments(text, tmp_path / "run", 4, *EMA, "--lr", 0.02, "--warmup", 1, "--lr-schedule", "constant")) == 0
    more = ["--dataset", text, "--checkpoint-dir", tmp_path / "run", "--steps", 6]
    assert train_here(*more) == 0
    whole = tmp_path / "whole"
    assert train_here(*arguments(text, whole, 6, *EMA, "--lr", 0.02, "--warmup", 1, "--lr-schedule", "constant")) == 0
    assert arrays(tmp_path / "run/step-00000006") == arrays(whole / "step-00000006")
    assert arrays(tmp_path / "run/final") == arrays(whole / "final")
    assert [row["val_loss"] for row in figures(tmp_path / "run") if "val_loss" in row][-1] == figures(whole)[-1]["val_loss"]


def test_merge_writes_the_average_of_a_step_and_says_where_there_is_none(place, tmp_path, capsys):
    assert cli.main(["merge", str(place / "run"), "--ema", "--output", str(tmp_path / "average")]) == 0
    assert "the moving average of the weights" in capsys.readouterr().out
    assert (arrays(tmp_path / "average"), read_info(tmp_path / "average").step) == (arrays(place / "run/final"), 6)
    assert read_info(tmp_path / "average").extra["merge"]["models"][0]["averaged"] == 0.9
    assert cli.main(["merge", str(place / "run/final"), "--ema", "--output", str(tmp_path / "no")]) == 2
    assert "keeps no averages of its weights" in capsys.readouterr().err


def test_eval_and_generate_take_the_average_of_a_step_where_they_are_asked_to(place, tmp_path, capsys):
    step, final, text = place / "run/step-00000006", place / "run/final", ["--dataset", str(place / "text.txt"), "--json"]

    def loss(*words) -> tuple[float, float]:
        assert eval.run("fake", load, [*map(str, words), *text]) == 0
        found = json.loads(capsys.readouterr().out)
        return found["texts"][0]["loss"], found["averaged"]

    assert loss(step, "--ema") == loss(final, "--ema") == loss(final) == loss(place / "run", "--ema")
    assert (loss(step)[1], loss(step, "--ema")[1]) == (0, 0.9)
    assert loss(step)[0] != loss(step, "--ema")[0]
    for words in ([step, "--ema"], [final]):
        assert generate.run("fake", load, [*map(str, words), "the cat", "--temperature", "0", "--max-tokens", "8"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    assert train_here(*arguments(place / "text.txt", tmp_path / "none", 2)) == 0
    assert eval.run("fake", load, [str(tmp_path / "none"), "--ema", *text]) == 2
    assert "keeps no averages of its weights" in capsys.readouterr().err
    damaged = tmp_path / "damaged" / step.name
    shutil.copytree(step, damaged)
    values = bytearray((damaged / "optimizer.safetensors").read_bytes())
    values[-1] ^= 1
    (damaged / "optimizer.safetensors").write_bytes(values)
    assert eval.run("fake", load, [str(damaged), "--ema", *text]) == 2
    assert "is damaged" in capsys.readouterr().err


def test_a_run_neither_drops_nor_begins_an_average(place, tmp_path, capsys):
    text = place / "text.txt"
    assert train_here("--checkpoint-dir", place / "run", "--dataset", text, "--steps", 8, "--ema", 0) == 2
    assert "keeps an average of its weights (--ema 0.9)" in capsys.readouterr().err
    assert train_here("--checkpoint-dir", place / "run", "--dataset", text, "--steps", 7, "--ema", 0.5) == 0
    assert "ema: 0.9 in the checkpoint, 0.5 now" in " ".join(capsys.readouterr().out.split())
