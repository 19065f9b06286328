"""`info` and `plot`: they tell what each thing is that smedjan makes."""

import json
import shutil

import pytest

from smedjan_common.commands import info, plot
from tests.fakes.runs import arguments, train_here, write_text


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("info")
    assert train_here(*arguments(write_text(folder), folder / "run", 12, "--checkpoint-every", 6)) == 0
    return folder


def facts(capsys, path, *words):
    assert info.main([str(path), "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_folder(made, capsys):
    found = facts(capsys, made / "run", "--verify")
    assert found["kind"] == "run folder"
    assert (found["step"], found["steps"], found["finished"]) == (12, 12, True)
    assert found["checkpoints"] == ["step-00000006", "step-00000012"]
    assert found["first"]["step"] == 1
    assert found["last"]["step"] == 12
    assert found["validation"]["val_loss"] > 0


def test_checkpoints_with_and_without_optimizer(made, capsys):
    step = facts(capsys, made / "run" / "step-00000006", "--verify")
    assert (step["kind"], step["step"], step["optimizer"]) == ("checkpoint", 6, "adamw")
    assert facts(capsys, made / "run" / "final")["kind"] == "checkpoint, weights only"


def test_a_token_file_and_a_tokenizer_share_their_hash(made, capsys):
    [data] = (made / "run" / "data").iterdir()
    tokens, tokenizer = facts(capsys, data / "train.bin", "--verify"), facts(capsys, data / "tokenizer.json")
    assert (tokens["kind"], tokenizer["kind"]) == ("token file", "tokenizer")
    assert tokens["tokenizer_hash"] == tokenizer["tokenizer_hash"]


def test_plain_text_output_has_every_fact(made, capsys):
    assert info.main([str(made / "run")]) == 0
    out = capsys.readouterr().out
    assert "run folder" in out
    assert "step-00000012" in out
    assert "dim 16" in out


def test_a_damaged_checkpoint_is_refused_by_verify(made, tmp_path, capsys):
    shutil.copytree(made / "run" / "final", tmp_path / "final")
    weights = tmp_path / "final" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert info.main([str(tmp_path / "final"), "--verify"]) == 2
    assert "model.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["missing", "text.txt", "."])
def test_what_is_nothing_of_smedjan_is_exit_2(made, name, capsys):
    assert info.main([str(made / name)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_plot_one_and_several_runs(made, tmp_path, capsys):
    shutil.copytree(made / "run", tmp_path / "run")
    (tmp_path / "run" / "loss.png").unlink()
    assert plot.main([str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "loss.png").exists()
    assert plot.main([str(made / "run"), str(tmp_path / "run"), "--output", str(tmp_path / "both.svg")]) == 0
    svg = (tmp_path / "both.svg").read_text()
    assert "<svg" in svg


@pytest.mark.parametrize("words", [("nowhere",), ("nowhere", "--output", "x.png"), ("run", "--output", "x.gif")])
def test_plot_refuses(made, words, capsys, monkeypatch):
    monkeypatch.chdir(made)
    assert plot.main(list(words)) == 2
    assert capsys.readouterr().err.startswith("error: ")
