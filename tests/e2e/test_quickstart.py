"""`smedjan quickstart`, what `make train` runs, with few steps: all of it is there, and a second time it says that it is done."""

import importlib.util
import os
import random
import subprocess
import sys

import pytest

from smedjan_common.commands.backends import installed
from smedjan_common.commands.quickstart import activation
from smedjan_common.errors import DataError
from smedjan_common.reporting.metrics import read_rows, train_rows
from smedjan_common.text import chat_corpus
from tests.fakes.runs import ROOT

DATA = tuple(f"data/quickstart/{name}" for name in ("corpus.jsonl", "tokenizer.json", "train.bin", "val.bin"))
NEEDS_CHATS = pytest.mark.skipif(importlib.util.find_spec("chatterbot_corpus") is None, reason="chatterbot-corpus is not installed")
MADE = (*DATA, "config.json", "metrics.jsonl", "loss.png", "sample.txt", "final")


def quickstart(folder, backend, *words):
    command = [sys.executable, "-m", "smedjan_common.cli", "quickstart", "--backend", backend, "--checkpoint-dir", str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=ROOT, env=os.environ, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("backend", ["jax", "mlx"])
def test_quickstart_makes_everything_and_a_second_time_is_done(tmp_path, backend):
    if not installed(backend):
        pytest.skip(f"{backend} is not installed")
    out = quickstart(tmp_path / "run", backend, "--steps", "6")
    assert all((tmp_path / "run" / name).exists() for name in MADE)
    rows = train_rows(read_rows(tmp_path / "run"))
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert f"first loss {rows[0]['loss']:.3f}" in out
    assert "bits per byte" in out
    again = quickstart(tmp_path / "run", backend, "--steps", "6")
    assert "Done already" in again
    assert "smedjan tokenizer" not in again
    assert "smedjan generate" in again, "the next commands to try"


def test_the_next_commands_begin_with_the_environment_where_the_shell_does_not_find_smedjan(tmp_path, monkeypatch):
    place = tmp_path / ".venv" / "bin"
    place.mkdir(parents=True)
    (place / "activate").touch()
    (place / "smedjan").touch(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(place / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert activation() == ["  source .venv/bin/activate"]
    monkeypatch.setenv("PATH", str(place))
    assert activation() == []


@NEEDS_CHATS
def test_with_chat_it_is_taught_to_answer(tmp_path):
    few = ("--steps", "4", "--chat", "--chat-steps", "3")
    out = quickstart(tmp_path / "run", "jax", *few)
    assert "Talk to it" in out
    assert f"smedjan chat {tmp_path / 'run-chat'}" in out
    assert (tmp_path / "run-chat" / "final").is_dir()
    assert int(out.partition("rows dropped")[0].rpartition("note: ")[2].split()[0]) < 50, "conversations that do not fit"
    assert "Done already" in quickstart(tmp_path / "run", "jax", *few).partition("smedjan sft")[2]


@NEEDS_CHATS
@pytest.mark.skipif(os.environ.get("SMEDJAN_TEST_FULL") != "1", reason="two minutes: SMEDJAN_TEST_FULL=1")
@pytest.mark.parametrize("backend", ["jax", "mlx"])
def test_what_it_was_taught_it_answers(tmp_path, backend):
    quickstart(tmp_path / "run", backend, "--chat")
    known = {}
    for question, *answer in (talk for talk in chat_corpus.chat_corpus() if len(talk) == 2):
        known.setdefault(question, []).extend(answer)
    asked = random.Random(1).sample(sorted(known), 20)
    command = [sys.executable, "-m", "smedjan_common.cli", "chat", str(tmp_path / "run-chat"), "--backend", backend, "--temperature", "0"]
    told = [
        subprocess.run(command, input=f"{question}\n", capture_output=True, text=True, timeout=300).stdout.strip() for question in asked
    ]
    assert sum(answer in known[question] for question, answer in zip(asked, told, strict=True)) >= 16


@NEEDS_CHATS
def test_conversations_are_short_the_same_every_time_and_end_with_an_answer():
    talks = chat_corpus.chat_corpus()
    assert talks == chat_corpus.chat_corpus()
    assert len(talks) > 1000
    assert all(len(talk) % 2 == 0 and all(talk) and sum(map(len, talk)) <= max(chat_corpus.MOST_IN_ALL, 60 * len(talk)) for talk in talks)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(chat_corpus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="make chat"):
        chat_corpus.chat_corpus()
