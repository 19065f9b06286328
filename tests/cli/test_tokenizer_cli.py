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
