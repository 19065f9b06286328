"""`info` and `plot`: they tell what each thing is that smedjan makes."""

import json
import shutil

import pytest

from smedjan_common.commands import info, plot
from smedjan_common.config import ModelConfig
from smedjan_common.inference.memory import state_bytes
from smedjan_common.model.flops import train_flops_per_token
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.tokenizer.chat import template_name, template_of
from smedjan_common.tokenizer.chat_files import CHATML_JINJA
from tests.fakes.runs import arguments, train_here, write_text
from tests.unit.convert_models import convert


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
    assert found["verified"] is True


def test_a_run_whose_config_is_gone_is_told_by_its_checkpoints(made, tmp_path, capsys):
    run = shutil.copytree(made / "run", tmp_path / "run")
    whole = facts(capsys, run)
    (run / "config.json").unlink()
    shown = ("step", "steps", "finished", "model", "training", "parameters", "tokenizer_hash")
    assert {name: facts(capsys, run).get(name) for name in shown} == {name: whole.get(name) for name in shown}


def test_flops_and_decode_state_are_those_of_the_context_and_the_training_dtype(made, capsys):
    for place in ("run", "run/step-00000006"):
        found = facts(capsys, made / place)
        model, dtype = ModelConfig.from_dict(found["model"]), found["training"]["dtype"]
        assert found["train_flops_per_token"] == train_flops_per_token(model, model.context_length)
        assert found["decode_state_bytes"] == state_bytes(model, 1, model.context_length, dtype)
        assert found["decode_state_dtype"] == dtype
    assert info.main([str(made / "run")]) == 0
    out = capsys.readouterr().out
    assert "train flops per token" in out
    assert "decode state bytes" in out


def test_checkpoints_with_and_without_optimizer(made, capsys):
    step = facts(capsys, made / "run" / "step-00000006", "--verify")
    assert (step["kind"], step["step"], step["optimizer"]) == ("checkpoint", 6, "adamw")
    assert facts(capsys, made / "run" / "final")["kind"] == "checkpoint, weights only"


def test_a_token_file_and_a_tokenizer_share_their_hash(made, capsys):
    [data] = (made / "run" / "data").iterdir()
    tokens, tokenizer = facts(capsys, data / "train.bin", "--verify"), facts(capsys, data / "tokenizer.json")
    assert (tokens["kind"], tokenizer["kind"]) == ("token file", "tokenizer")
    assert tokens["tokenizer_hash"] == tokenizer["tokenizer_hash"]


def test_the_chat_template_of_a_run_a_checkpoint_and_a_directory_is_named(made, tmp_path, capsys):
    run = shutil.copytree(made / "run", tmp_path / "run")
    newest = run / "step-00000012"
    convert(newest, tmp_path / "hf", "--to", "hf")
    capsys.readouterr()
    places = (newest, run, tmp_path / "hf")
    assert [facts(capsys, place)["chat_template"] for place in places] == ["none"] * 3
    (newest / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    (tmp_path / "hf" / "chat_template.jinja").write_text(CHATML_JINJA)
    assert [facts(capsys, place)["chat_template"] for place in places] == ["jinja", "jinja", "chatml"]
    own = Tokenizer.train_from_texts(["the cat"], 260, special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    own.save(tmp_path / "tokenizer.json")
    assert template_name(tmp_path) == template_of(None, Tokenizer.load(tmp_path / "tokenizer.json")).name == "chatml"
    assert facts(capsys, made / "run" / "final")["chat_template"] == "none"
    (newest / "tokenizer_config.json").write_text('{"chat_template": 3}')
    assert "cannot be used: It is not a text" in facts(capsys, run)["chat_template"]


def test_plain_text_output_has_every_fact(made, capsys):
    assert info.main([str(made / "run")]) == 0
    out = capsys.readouterr().out
    assert "run folder" in out
    assert "step-00000012" in out
    assert "dim 16" in out
    unread = ("rwkv_head_dim", "expert_dim", "muon_steps", "balance_loss")
    assert not [name for name in unread if f"{name} " in out], "a person is told the options that the run reads"
    assert all(name in facts(capsys, made / "run")[where] for name, where in zip(unread, ("model",) * 2 + ("training",) * 2, strict=True))


def test_facts_fit_into_a_terminal_and_are_one_line_each_elsewhere(made, capsys, monkeypatch):
    assert info.main([str(made / "run")]) == 0
    whole = capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(info.sys.stdout, "isatty", lambda: True, raising=False)
    assert info.main([str(made / "run")]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, whole.splitlines())) > 80
    assert [line for line in shown.splitlines() if len(line) > 80 and len(line.split()) > 4] == []
    assert shown.split() == whole.split()


def test_a_damaged_checkpoint_is_refused_by_verify(made, tmp_path, capsys):
    shutil.copytree(made / "run" / "final", tmp_path / "final")
    weights = tmp_path / "final" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert info.main([str(tmp_path / "final"), "--verify"]) == 2
    assert "model.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("victim", ["final", "step-00000012", "step-00000006"])
def test_a_run_with_a_damaged_checkpoint_is_not_verified(made, tmp_path, victim, capsys):
    run = tmp_path / "run"
    shutil.copytree(made / "run", run)
    weights = run / victim / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert info.main([str(run), "--json", "--verify"]) == 2
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["verified"] is False
    assert str(weights) in found["broken"][0]
    assert str(weights) in err
    assert victim not in found["checkpoints"]


def test_a_run_beside_a_broken_checkpoint_is_not_verified_and_says_so_unasked(made, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(made / "run", run)
    for victim in ("step-00000012", "final"):
        (run / victim / "checkpoint.json").unlink()
    found = facts(capsys, run)
    assert (len(found["broken"]), found["verified"], found["checkpoints"]) == (2, None, ["step-00000006"])
    assert info.main([str(run), "--verify"]) == 2
    assert "2 of the checkpoints" in capsys.readouterr().err


@pytest.mark.parametrize("text", ['{"model_type": "llama", "architectures": []}', "{", "[]"])
def test_a_directory_of_hugging_face_is_no_run(tmp_path, text, capsys):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert info.main([str(tmp_path)]) == 2
    assert "*.safetensors beside it" in capsys.readouterr().err


def test_a_model_of_hugging_face_is_described_without_being_converted(made, tmp_path, capsys):
    convert(made / "run", tmp_path / "hf", "--to", "hf")
    capsys.readouterr()
    run, found = facts(capsys, made / "run"), facts(capsys, tmp_path / "hf")
    assert found["kind"] == "Hugging Face directory"
    assert {name: found[name] for name in ("parameters", "tokenizer_hash")} == {
        name: run[name] for name in ("parameters", "tokenizer_hash")
    }
    assert info.main([str(tmp_path / "hf"), "--verify"]) == 2
    assert "keeps no hashes" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["missing", "text.txt", "run/data"])
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
    assert plot.main([str(tmp_path / "run")]) == 0  # one of its own is replaced


def test_a_picture_that_smedjan_did_not_draw_is_not_replaced(made, tmp_path, capsys):
    picture = tmp_path / "mine.png"
    picture.write_bytes(b"another program's")
    assert plot.main([str(made / "run"), "--output", str(picture)]) == 2
    assert "already exists" in capsys.readouterr().err
    assert picture.read_bytes() == b"another program's"
    assert plot.main([str(made / "run"), "--output", str(picture), "--force"]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("words", [("nowhere",), ("nowhere", "--output", "x.png"), ("run", "--output", "x.gif")])
def test_plot_refuses(made, words, capsys, monkeypatch):
    monkeypatch.chdir(made)
    assert plot.main(list(words)) == 2
    assert capsys.readouterr().err.startswith("error: ")
