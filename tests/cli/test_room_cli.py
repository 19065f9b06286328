"""`train` on a machine that is too small for the run, as users meet it: refused before anything is computed, with what would fit."""

import collections
import os
import subprocess
import sys

import pytest

from smedjan_common.reporting.metrics import read_rows
from smedjan_common.run import room
from tests.fakes.runs import ROOT, arguments, train_here, write_text

FAR_TOO_LARGE = "--size max --batch-size 512 --seq-len 8192 --steps 10"


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path)


@pytest.mark.parametrize("backend", ["jax", "mlx"])
def test_a_dry_run_of_a_far_too_large_model_ends_with_3_before_anything_is_allocated(text, tmp_path, backend: str):
    pytest.importorskip({"jax": "jax", "mlx": "mlx.core"}[backend])
    command = [sys.executable, "-m", f"smedjan_{backend}.train", "--dataset", str(text), "--checkpoint-dir", str(tmp_path / "run")]
    quiet = os.environ | {"JAX_PLATFORMS": "cpu", "SMEDJAN_NO_OPENBLAS": "1"}
    process = subprocess.Popen(
        [*command, *FAR_TOO_LARGE.split(), "--dry-run"], cwd=ROOT, env=quiet, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stderr
    out, err = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 3, err
    assert "The run needs about" in err
    assert "TiB" in err
    assert "--force" in err
    assert out == ""
    assert usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) < 1 << 30
    assert not (tmp_path / "run").exists()


def test_a_real_run_is_refused_too_and_force_trains(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(room, "available_memory", lambda: 1 << 16)
    words = arguments(text, tmp_path / "run", 4, "--log-every", 2)
    assert train_here(*words) == 3
    told = capsys.readouterr()
    assert "64.0 KiB are there" in told.err
    assert read_rows(tmp_path / "run") == []
    assert train_here(*words, "--force") == 0
    assert "--force goes on" in capsys.readouterr().out
    assert read_rows(tmp_path / "run")[-1]["step"] == 4


def test_a_full_disk_is_noticed_before_the_first_step(text, tmp_path, capsys, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: usage(1 << 40, 0, 10_000))
    words = arguments(text, tmp_path / "run", 4)
    assert train_here(*words, "--dry-run") == 3
    assert train_here(*words) == 3
    assert "of disk, and 9.8 KiB are free" in capsys.readouterr().err
    assert read_rows(tmp_path / "run") == []


def test_a_dry_run_says_what_memory_and_disk_a_run_takes_of_what_there_is(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(room, "available_memory", lambda: 8 << 30)
    assert train_here(*arguments(text, tmp_path / "run", 4), "--dry-run") == 0
    out = capsys.readouterr().out
    assert "of 8.0 GiB that are free" in out
    assert "a checkpoint" in out
