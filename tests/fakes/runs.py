"""Runs of the bigram backend for tests: their flags, starting them in this process or in one of their own, reading what they left."""

import os
import subprocess
import sys
from pathlib import Path

from smedjan_common.checkpoint import find_checkpoints, read_checkpoint
from smedjan_common.commands import train
from smedjan_common.reporting.metrics import read_rows
from smedjan_common.run.asked import Asked
from smedjan_common.run.checks import check
from smedjan_common.run.decided import decide
from smedjan_common.run.given import parse
from smedjan_common.run.start import New
from tests.fakes import bigram

ROOT = Path(__file__).parents[2]
TEXT = "".join(f"the cat no. {i} sat on the mat and the dog {i * i} ran off with it; what a day!\n" for i in range(400))
SMALL = "--size custom --dim 16 --layers 1 --heads 2 --ffn-mult 1 --vocab-size 300 --val-fraction 0.1 --batch-size 4 --seq-len 16 --lr 0.02"
RARELY = {"--checkpoint-every": "500", "--eval-every": "250", "--sample-every": "0"}


def write_text(folder: Path) -> Path:
    """A small text to train on."""
    path = folder / "text.txt"
    path.write_text(TEXT)
    return path


def train_here(*words: object, backend: type = bigram.BigramBackend) -> int:
    """Train in this process; returns the exit code."""
    return train.run("fake", lambda deterministic: (backend, "float32"), [str(word) for word in words])


def check_new(*words: str) -> None:
    """The checks that a new run of these words goes through before its texts are tokenised."""
    check(decide("fake", Asked(*parse([*words])), New(), Path()))


def arguments(text: Path, folder: Path, steps: int, *more: object) -> list[str]:
    """A command line: of a run that is rarely saved and evaluated and never sampled, unless `more` says so."""
    rarely = [word for name, every in RARELY.items() if name not in more for word in (name, every)]
    return [*SMALL.split(), *rarely, "--dataset", str(text), "--checkpoint-dir", str(folder), "--steps", str(steps), *map(str, more)]


def start(module: str, *words: object, fake: str = "", **options) -> subprocess.Popen:
    """Start `python -m module …` with SMEDJAN_FAKE=fake and with the buffers that users have."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | options.pop("env", {})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8", "cwd": ROOT} | options
    return subprocess.Popen([sys.executable, "-m", module, *map(str, words)], env=environment | {"SMEDJAN_FAKE": fake}, **pipes)


def figures(folder: Path) -> list[dict]:
    """Rows of metrics.jsonl without what depends on the clock and on the process, nor that the run was resumed."""
    timed = ("tokens_per_second", "mfu", "elapsed_seconds", "peak_memory_bytes")
    return [{key: value for key, value in row.items() if key not in timed} for row in read_rows(folder) if "event" not in row]


def arrays(folder: Path) -> dict[str, bytes]:
    """Every array of the newest checkpoint, as bytes."""
    snapshot = read_checkpoint(folder).snapshot
    return {name: value.tobytes() for name, value in (snapshot.params | snapshot.optimizer).items()}


def saved_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints."""
    return [found.step for found in find_checkpoints(folder)]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
