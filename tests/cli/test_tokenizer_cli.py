"""`smedjan tokenizer` and `smedjan prepare` as a user meets them: exit codes, messages, files."""

import json
import resource
import subprocess
import sys

import pytest

from smedjan_common.commands import prepare as prepare_command
from smedjan_common.commands import tokenizer as tokenizer_command


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("the smith and the hammer, the iron and the fire\n" * 200)
    return str(file)


def test_from_text_to_token_files(tmp_path, text, capsys):
    tokenizer, train, val = str(tmp_path / "t.json"), str(tmp_path / "train.bin"), str(tmp_path / "val.bin")
    assert tokenizer_command.main(["--input", text, "--vocab-size", "300", "--output", tokenizer]) == 0
    assert "tokens, hash" in capsys.readouterr().out
    arguments = ["--input", text, "--tokenizer", tokenizer, "--output", train, "--val-output", val, "--val-fraction", "0.1"]
    assert prepare_command.main(arguments) == 0
    assert "(the end of the text)" in capsys.readouterr().out
    assert json.loads((tmp_path / "train.bin.json").read_text())["tokens"] > 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert prepare_command.main(arguments) == 2
    assert "--force" in capsys.readouterr().err
    assert tokenizer_command.main(["--input", text, "--vocab-size", "310", "--output", tokenizer]) == 2
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert tokenizer_command.main(["--input", text, "--vocab-size", "310", "--output", tokenizer, "--force"]) == 0
    assert prepare_command.main([*arguments, "--force"]) == 0


@pytest.mark.parametrize(
    ("command", "arguments", "says"),
    [
        (tokenizer_command, ["--input", "missing.txt"], "no input 'missing.txt'"),
        (tokenizer_command, ["--input", "{text}", "--vocab-size", "100"], "at least 257"),
        (tokenizer_command, ["--input", "{text}", "--pattern", "clk100"], "cl100k"),
        (tokenizer_command, ["--input", "{text}", "--special", "the"], "--special 'the' cannot name a special token"),
        (tokenizer_command, ["--input", "{text}", "--pattern", "[a[b]]|."], "a set inside a set"),
        (prepare_command, ["--input", "{text}", "--tokenizer", "missing.json"], "smedjan tokenizer"),
        (prepare_command, ["--input", "{text}", "--output", "x.bin", "--val-output", "x.bin"], "same name"),
    ],
)
def test_wrong_usage_is_exit_code_2_with_what_to_do(text, command, arguments, says, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert command.main([argument.replace("{text}", text) for argument in arguments]) == 2
    assert says in capsys.readouterr().err


def test_one_file_says_the_flags_of_both_and_the_command_line_wins(tmp_path, text, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tables = (
        '[tokenizer]\ninput = ["text.txt"]\nvocab-size = 270\n[prepare]\ninput = ["text.txt"]\nval_fraction = 0.1\nval_output = "val.bin"\n'
    )
    (tmp_path / "data.toml").write_text(tables)
    for words in (["--output", "a.json"], ["--output", "b.json", "--vocab-size", "265"]):
        assert tokenizer_command.main(["--config", "data.toml", *words]) == 0
    assert [len(json.loads((tmp_path / name).read_text())["model"]["vocab"]) for name in ("a.json", "b.json")] == [269, 264]
    assert prepare_command.main(["--config=data.toml", "--tokenizer", "a.json"]) == 0
    assert (tmp_path / "train.bin").stat().st_size > (tmp_path / "val.bin").stat().st_size > 0
    capsys.readouterr()
    (tmp_path / "flat.toml").write_text('input = "text.txt"\nreport = true\n')
    assert tokenizer_command.main(["--config", "flat.toml", "--output", "c.json"]) == 0
    assert "bytes per token" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        ("vocab_siz = 300\n", 1, "Did you mean --vocab-size?"),
        ("[tokeniser]\nvocab_size = 300\n", 2, "Did you mean tokenizer?"),
        ("\nval_fraction = 0.1\n", 2, "no flag of tokenizer"),
        ('[tokenizer]\nvocab_size = "300"\n', 2, "It must be a whole number."),
        ('byte_order = "gpt3"\n', 1, "It must be one of gpt2, raw."),
        ("force = true\n", 1, "Write --force there."),
        ("vocab_size = 300\n[tokenizer]\nvocab-size = 301\n", 3, "line 1 too"),
    ],
)
def test_what_is_wrong_in_a_file_is_told_with_its_line(tmp_path, text, capsys, content, line, says):
    file = tmp_path / "data.toml"
    file.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        tokenizer_command.main([text, "--config", str(file)])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert f"error: {file}, line {line}: " in err
    assert says in err


def test_a_file_without_inputs_leaves_them_to_be_asked_for(tmp_path, capsys):
    (tmp_path / "data.toml").write_text("vocab_size = 300\n")
    with pytest.raises(SystemExit):
        tokenizer_command.main(["--config", str(tmp_path / "data.toml")])
    assert "smedjan tokenizer needs PATH" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tokenizer", "prepare"])
def test_help_is_quick_and_imports_little(name):
    code = (
        f"import sys; sys.argv=['x','--help']\nfrom smedjan_common.commands.{name} import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print('HEAVY', sorted({'numpy','regex','jax','mlx','torch','tokenizers','matplotlib','rich'} & set(sys.modules)))"
    )
    best = 9.0
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert "--force" in out
    assert "HEAVY []" in out
    assert best < 0.6  # seconds of CPU: 0.2 on a quiet machine, and the clock would count what else runs
