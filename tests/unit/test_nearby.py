"""A wrong path is answered with the right one, by every command that takes a path."""

import pytest

from smedjan_common import cli
from smedjan_common.nearby import SHOWN, beside
from tests.fakes.runs import train_here


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with two run folders, a text, a token file and a tokenizer (empty: only their names count)."""
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/mine/final", "runs/other/step-00000300", "texts"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("corpus.txt", "train.bin", "tokenizer.json", "texts/one.txt", ".hidden.txt", "Notes.md"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("corpsu.txt", "corpus.txt"),
        ("corpus", "corpus.txt"),
        ("CORPUS.TXT", "corpus.txt"),
        ("notes.md", "Notes.md"),
        ("train.bni", "train.bin"),
        ("runs/mien", "runs/mine"),
        ("runz/mine", "runs/mine"),
        ("mine", "runs/mine"),
        ("runs/mine/fnal", "runs/mine/final"),
        ("runs/other/step-300", "runs/other/step-00000300"),
        ("text/one.txt", "texts/one.txt"),
        ("text/two.txt", "texts"),
    ],
)
def test_the_path_that_was_meant_is_named(place, wrong, right):
    said = beside(wrong)
    assert said.startswith("Did you mean ")
    assert right in said.removeprefix("Did you mean ").rstrip("?").split(" or ")


def test_where_nothing_is_spelled_alike_what_is_there_is_listed(place):
    assert beside("runs/zzz") == "Beside that path there are runs/mine, runs/other."
    assert beside("texts/zzz.txt") == "Beside that path there is texts/one.txt."
    for number in range(SHOWN + 2):
        (place / "texts" / f"{number}{number}{number}.jsonl").touch()
    assert beside("texts/q.jsonl").endswith("and 2 more.")
    assert beside("nowhere/at/all") == beside("q.bin.gz") == ""


def test_absolute_paths_and_paths_that_exist(place):
    assert str(place / "corpus.txt") in beside(place / "corpsu.txt")
    assert beside("corpus.txt") == beside("") == beside("/") == ""


@pytest.mark.parametrize(
    ("command", "right"),
    [
        (("tokenizer", "--input", "corpsu.txt", "--output", "new.json"), "corpus.txt"),
        (("prepare", "--input", "corpus.txt", "--tokenizer", "tokeniser.json", "--output", "new.bin"), "tokenizer.json"),
        (("process", "--input", "text", "--output", "new.jsonl"), "texts"),
        (("convert", "runs/mien", "out", "--to", "hf"), "runs/mine"),
        (("info", "runs/mien"), "runs/mine"),
        (("plot", "runs/mien"), "runs/mine"),
        (("hash", "corpsu.txt"), "corpus.txt"),
        (("import-bpe", "--merges", "corpsu.txt", "--output", "new.json"), "corpus.txt"),
        (("mix", "--shards", "trian.bin:1", "--output", "new.bin"), "train.bin"),
    ],
)
def test_every_command_names_what_is_beside_a_wrong_path(place, capsys, command, right):
    assert cli.main([*command]) == 2
    assert f"Did you mean {right}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "right"),
    [
        (("--dataset", "corpsu.txt"), "corpus.txt"),
        (("--dataset", "trian.bin"), "train.bin"),
        (("--dataset", "corpus.txt", "--tokenizer", "tokeniser.json"), "tokenizer.json"),
        (("--dataset", "corpus.txt", "--pretrained", "runs/mien"), "runs/mine"),
        (("--dataset", "corpus.txt", "--resume", "runs/mine/fnal"), "runs/mine/final"),
        (("--checkpoint-dir", "runs/mien"), "runs/mine"),
    ],
)
def test_training_names_what_is_beside_a_wrong_path(place, capsys, words, right):
    assert train_here(*words) == 2
    assert f"Did you mean {right}" in capsys.readouterr().err
