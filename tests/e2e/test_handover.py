"""The newcomer's way: one's own text, one backend, Ctrl-C, the other backend, a text from the model. Real commands, real signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smedjan_mlx.openblas import OFF
from tests.conformance.compare import Difference, demand
from tests.conformance.gates import FLOAT32

TEXT = "".join(f"The smith of village {i % 97} struck the iron {i % 13} times; sparks flew over anvil {i % 7}.\n" for i in range(3000))
FLAGS = "--size custom --dim 32 --layers 2 --heads 4 --kv-heads 2 --vocab-size 300 --batch-size 4 --seq-len 32 --log-every 1".split()
FLAGS += ["--sample-every", "0"]
OTHER = {"jax": "mlx", "mlx": "jax"}


def start(backend: str, folder: Path, *flags: str) -> subprocess.Popen:
    """Start training in a process of its own, as a user would."""
    command = [sys.executable, "-m", f"smedjan_{backend}.train", "--checkpoint-dir", "run", *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=folder, text=True, env=os.environ | {OFF: "1", "PYTHONUNBUFFERED": "1"}, **pipes)


def train(backend: str, folder: Path, *flags: str) -> str:
    """Train to the end; returns what was printed."""
    process = start(backend, folder, *flags)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def rows(folder: Path) -> list[dict]:
    """Training rows of the run's metrics."""
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def generate(backend: str, folder: Path) -> str:
    """A sampled text from the run's newest weights."""
    command = [sys.executable, "-m", f"smedjan_{backend}.generate", "--checkpoint", "run", "--prompt", "The smith", "--max-tokens", "20"]
    done = subprocess.run([*command, "--seed", "5"], cwd=folder, text=True, capture_output=True, timeout=300, env=os.environ | {OFF: "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("first", ["jax", "mlx"])
def test_own_text_stopped_in_one_backend_goes_on_in_the_other(tmp_path, first):
    (tmp_path / "my.txt").write_text(TEXT)
    process = start(first, tmp_path, "--dataset", "my.txt", *FLAGS, "--steps", "100000")
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 5):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no step was logged"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    stopped = rows(tmp_path)[-1]["step"]
    assert (tmp_path / "run" / f"step-{stopped:08d}" / "checkpoint.json").is_file()

    assert "Going on from" in train(OTHER[first], tmp_path, "--steps", str(stopped + 30))
    steps = [row["step"] for row in rows(tmp_path)]
    assert steps == list(range(1, stopped + 31)), "every step stands once"
    losses = [row["loss"] for row in rows(tmp_path)]
    assert losses[-1] < losses[0] - 0.5
    assert abs(losses[stopped] - losses[stopped - 1]) < 0.5, "the loss goes on where it was"
    assert generate("jax", tmp_path) == generate("mlx", tmp_path), "the same seed writes the same text in both backends"
    assert "Done already" in train(first, tmp_path, "--steps", str(stopped + 30))


@pytest.mark.parametrize("backend", ["jax", "mlx"])
def test_a_stopped_and_resumed_run_has_the_bits_of_one_that_was_not(tmp_path, backend):
    from smedjan_common.checkpoint import read_checkpoint

    flags = ["--dataset", "my.txt", *FLAGS, "--steps", "24", "--eval-every", "8", "--grad-accum", "2", "--gradient-checkpointing", "dots"]
    flags += ["--log-every=4"]  # the run is stopped between two rows, which are means
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
        (folder / "my.txt").write_text(TEXT)
    train(backend, whole, *flags)
    train(backend, parts, *flags, "--checkpoint-every", "10", "--keep", "0")
    (parts / "run" / "final").rename(parts / "gone")
    (parts / "run" / "step-00000024").rename(parts / "gone-too")
    train(backend, parts, *flags)

    a, b = (read_checkpoint(folder / "run" / "step-00000024").snapshot for folder in (whole, parts))
    assert a.step == b.step == 24
    for kind in ("params", "optimizer"):
        for name, value in getattr(a, kind).items():
            assert value.tobytes() == getattr(b, kind)[name].tobytes(), f"{kind} {name} differs"
    measured = ("tokens_per_second", "mfu", "peak_memory_bytes", "elapsed_seconds")
    kept = [
        [
            {k: v for k, v in row.items() if k not in measured}
            for row in map(json.loads, (f / "run" / "metrics.jsonl").open())
            if "event" not in row
        ]
        for f in (whole, parts)
    ]
    assert kept[0] == kept[1], "every line of metrics is the same"


@pytest.fixture(scope="module")
def sixty_steps(tmp_path_factory):
    """Losses of 60 steps of JAX alone."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "my.txt").write_text(TEXT)
    train("jax", folder, "--dataset", "my.txt", *FLAGS, *STEADY, "--steps", "60")
    return [row["loss"] for row in rows(folder)]


STEADY = ("--lr-schedule", "constant", "--warmup", "3", "--eval-every", "0")  # a rate that does not depend on --steps


@pytest.mark.parametrize("form", ["neutral", "orbax"])
def test_jax_then_mlx_then_jax_has_the_loss_curve_of_one_backend(tmp_path, sixty_steps, form):
    (tmp_path / "my.txt").write_text(TEXT)
    train("jax", tmp_path, "--dataset", "my.txt", *FLAGS, *STEADY, "--steps", "20", "--checkpoint-format", form)
    if form == "orbax":
        command = [sys.executable, "-m", "convert", "run/orbax-00000020", "run/step-00000020", "--to", "neutral"]
        subprocess.run(command, cwd=tmp_path, check=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])})
    assert "step 20 of 40" in train("mlx", tmp_path, "--steps", "40")
    assert "step 40 of 60" in train("jax", tmp_path, "--steps", "60")
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 61))
    apart = [abs(row["loss"] / alone - 1) for row, alone in zip(rows(tmp_path), sixty_steps, strict=True)]
    assert apart[:20] == [0.0] * 20, "the first turn is the same backend"
    assert max(apart[20:]) > 0, "the second is another one"
    demand([Difference(f"loss at step {step}", value, FLOAT32.steps_loss) for step, value in enumerate(apart, 1)])
