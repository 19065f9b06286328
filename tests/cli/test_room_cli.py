"""`train` on a machine that is too small for the run, as users meet it: refused before anything is computed, with what would fit."""

import collections
import os
import re
import subprocess
import sys

import pytest

from smedjan_common.checkpoint import read_info
from smedjan_common.commands import prepare, tokenizer
from smedjan_common.reporting.metrics import read_rows
from smedjan_common.run import room
from tests.fakes.runs import ROOT, SMALL, arguments, train_here, write_text

FAR_TOO_LARGE = "--size max --batch-size 512 --seq-len 8192 --steps 10"
# a small process between this one and the command: on Linux a peak of a child counts what its parent had when it was started
MEASURED = """import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(code)"""


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path)


@pytest.mark.parametrize("backend", ["jax", "mlx"])
def test_a_dry_run_of_a_far_too_large_model_ends_with_3_before_anything_is_allocated(text, tmp_path, backend: str):
    pytest.importorskip({"jax": "jax", "mlx": "mlx.core"}[backend])
    command = [sys.executable, "-m", f"smedjan_{backend}.train", "--dataset", str(text), "--checkpoint-dir", str(tmp_path / "run")]
    quiet = os.environ | {"JAX_PLATFORMS": "cpu", "SMEDJAN_NO_OPENBLAS": "1"}
    measured = [sys.executable, "-c", MEASURED, *command, *FAR_TOO_LARGE.split(), "--dry-run"]
    done = subprocess.run(measured, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    assert "The run needs about" in done.stderr
    assert "TiB" in done.stderr
    assert "--force" in done.stderr
    [peak] = done.stdout.split()  # the command itself says nothing there
    assert int(peak) * (1 if sys.platform == "darwin" else 1024) < 1 << 30
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


@pytest.fixture
def tokens(tmp_path):
    """A folder with a token file of the text and its tokenizer of some 300 tokens."""
    text, made = write_text(tmp_path), tmp_path / "made"
    made.mkdir()
    assert tokenizer.main(["--input", str(text), "--output", str(made / "tokenizer.json"), "--vocab-size", "300"]) == 0
    words = ["--input", str(text), "--output", str(made / "train.bin"), "--tokenizer", str(made / "tokenizer.json")]
    assert prepare.main(words) == 0
    return made


WAYS = {  # how a text comes to be tokenised
    "a tokenizer is trained": lambda text, made: ["--dataset", text],
    "a tokenizer is given": lambda text, made: ["--dataset", text, "--tokenizer", made],
    "only to validate": lambda text, made: ["--dataset", made / "train.bin", "--val-dataset", text],
}


@pytest.mark.parametrize("dry", [(), ("--dry-run",)], ids=["real", "dry"])
@pytest.mark.parametrize("way", WAYS)
def test_a_far_too_large_model_is_refused_before_its_text_is_tokenised(text, tokens, tmp_path, capsys, monkeypatch, way: str, dry):
    monkeypatch.setattr("smedjan_common.run.data.prepare", None)
    monkeypatch.setattr("smedjan_common.run.data.Tokenizer.train", None)
    capsys.readouterr()
    words = [*WAYS[way](text, tokens), "--checkpoint-dir", tmp_path / "run", *FAR_TOO_LARGE.split(), *dry]
    assert train_here(*words) == 3
    told = capsys.readouterr()
    assert "The run needs about" in told.err
    assert "TiB" in told.err
    assert told.out == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("way", WAYS)
def test_before_a_text_is_tokenised_its_vocabulary_is_that_of_its_tokenizer_or_at_most_what_was_asked_for(
    text, tokens, tmp_path, monkeypatch, way: str
):
    seen, check = [], room.check_memory
    monkeypatch.setattr(room, "check_memory", lambda model, *rest, **more: seen.append(model.vocab_size) or check(model, *rest, **more))
    words = [*WAYS[way](text, tokens), "--checkpoint-dir", tmp_path / "run", *SMALL.split(), "--steps", 1]
    words[words.index("--vocab-size") : words.index("--vocab-size") + 2] = ["--vocab-size", "5000"] if "trained" in way else []
    words = [word for word in words if word not in ("--val-fraction", "0.1")] if "validate" in way else words
    assert train_here(*words) == 0
    real = read_info(tmp_path / "run").model.vocab_size
    assert seen == [5000 if "trained" in way else real, real]
    assert real < 5000
    seen.clear()
    assert train_here("--checkpoint-dir", tmp_path / "run", "--steps", 2) == 0
    assert seen == [real], "what is tokenised is not asked about twice"


def test_with_force_what_does_not_fit_is_told_once(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(room, "available_memory", lambda: 1 << 16)
    assert train_here(*arguments(text, tmp_path / "run", 1), "--force") == 0
    assert capsys.readouterr().out.count("--force goes on") == 1


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
    assert re.search(r"memory   about [\d.]+ .iB, 8\.0 GiB free\n", out)
    assert "a checkpoint" in out
