"""Outputs of the commands that make data: nothing is replaced without --force, and what is read never."""

import json
import os
from pathlib import Path

import pytest

from smedjan_common.cli import main
from smedjan_common.commands.outputs import check_outputs
from smedjan_common.errors import DataError
from smedjan_common.tokenizer import Tokenizer


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Text, a tokenizer, a token file, and the same files by other names."""
    monkeypatch.chdir(tmp_path)
    Path("text").mkdir()
    Path("text/a.txt").write_text("iron and fire\n" * 20)
    Path("a.jsonl").write_text(json.dumps({"text": "iron"}) + "\n")
    Tokenizer.train_from_texts(["iron and fire, a hammer. " * 20], 270).save("t.json")
    assert main(["prepare", "--input", "text", "--tokenizer", "t.json", "--output", "a.bin"]) == 0
    return tmp_path


def content(place: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in place.rglob("*") if path.is_file()}


COMMANDS = {  # what is read, with what stands for the output
    "tokenizer": "--input {input} --vocab-size 270",
    "prepare": "--input {input} --tokenizer t.json",
    "process": "--input {input}",
    "dedup": "--input {input}",
    "mix": "--shards a.bin:1",
    "import-bpe": "--merges t.json",
}


def words(command: str, output: str, *more: str, source: str = "text/a.txt") -> list[str]:
    return [command, *COMMANDS[command].format(input=source).split(), "--output", output, *more]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_stands_is_replaced_with_force_alone(place, command, capsys):
    Path("out").write_text("mine")
    before = content(place)
    assert main(words(command, "out")) == 2
    assert "'out' already exists" in capsys.readouterr().err
    assert content(place) == before
    Path("gone").symlink_to("nowhere")
    assert main(words(command, "gone")) == 2
    assert main(words(command, "out", "--force")) == 0
    assert Path("out").read_bytes() != b"mine"


@pytest.mark.parametrize("command", ["prepare", "mix"])
@pytest.mark.parametrize("beside", ["new.bin.json", "new.bin.offsets"])
def test_what_stands_beside_a_token_file_counts_as_well(place, command, beside):
    Path(beside).write_text("mine")
    before = content(place)
    assert main(words(command, "new.bin")) == 2
    assert content(place) == before


def other_names(path: str) -> list[str]:
    """The same file by its absolute path, another spelling, a symbolic and a hard link, and a link to its directory."""
    Path("link").symlink_to(path)
    os.link(path, "hard")
    Path("folder").symlink_to(os.path.dirname(path) or ".")
    return [path, os.path.abspath(path), f"./text/../{path}", "link", "hard", os.path.join("folder", os.path.basename(path))]


@pytest.mark.parametrize("command", COMMANDS)
def test_an_input_is_no_output_by_any_name_and_not_with_force(place, command, capsys):
    source = {"mix": "a.bin", "import-bpe": "t.json"}.get(command, "text/a.txt")
    names = other_names(source)
    before = content(place)
    for name in names:
        assert main(words(command, name, "--force")) == 2
        assert "would destroy what is read" in capsys.readouterr().err
    assert content(place) == before


@pytest.mark.parametrize("source", ["text", "text/*.txt", "te*"])
def test_a_file_that_a_folder_or_glob_names_is_an_input(place, source):
    before = content(place)
    assert main(words("dedup", "text/a.txt", "--force", source=source)) == 2
    assert content(place) == before


@pytest.mark.parametrize(
    "words",
    [
        ["prepare", "--input", "text", "--tokenizer", "t.json", "--output", "t.json", "--force"],
        ["prepare", "--input", "text", "--tokenizer", "t.json", "--output", "n.bin", "--val-output", "n.bin.json", "--val-fraction", "0.1"],
        ["mix", "--shards", "a.bin:1", "--output", "a.bin.json", "--force"],
        ["process", "--input", "a.jsonl", "--output", "o.jsonl", "--log", "a.jsonl", "--force"],
        ["process", "--input", "a.jsonl", "--output", "o.jsonl", "--report", "folder/o.jsonl", "--force"],
        ["dedup", "--input", "a.jsonl", "--output", "o.jsonl", "--report", "a.jsonl", "--force"],
        ["tokenizer", "--input", "text", "--output", "text"],
    ],
)
def test_every_file_that_is_written_is_held_against_every_file_that_is_read_or_written(place, words):
    Path("folder").symlink_to(".")
    before = content(place)
    assert main(words) == 2
    assert content(place) == before


def test_a_device_is_no_output(tmp_path):
    """Root would replace /dev/null by a file."""
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/null", str(tmp_path / "pipe")):
        with pytest.raises(DataError, match="device or a pipe"):
            check_outputs([path], force=True)
