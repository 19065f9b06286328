"""`smedjan quickstart`, what `make train` runs, with few steps: all of it is there, and a second time it says that it is done."""

import os
import subprocess
import sys

import pytest

from smedjan_common.commands.backends import installed
from smedjan_common.commands.quickstart import activation
from smedjan_common.reporting.metrics import read_rows, train_rows
from tests.fakes.runs import ROOT

DATA = tuple(f"data/quickstart/{name}" for name in ("corpus.jsonl", "tokenizer.json", "train.bin", "val.bin"))
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
