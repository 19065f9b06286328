"""Loss curves side by side: ours and the strong torch peer, kernels and plain forms, float8 and bfloat16, on the same batches of text.

    smedjan tokenizer TEXT --output data/tokenizer.json && smedjan prepare TEXT --tokenizer data/tokenizer.json --output data/train.bin
    python -m bench.learning_peer --data data                  every pair -> bench/results/curves-DEVICE.json

A curve is a process: the same initial values, the same order of the batches, the same learning rates. Two curves of a pair are held
against each other by means over WINDOW steps: `largest` is the largest relative difference of two such means after the first tenth of
the steps, `last` that of the last tenth.

Two runs of the same program part too where their initial values differ by no more than bfloat16 rounds: the pairs `noise …` say by how
much, and no other pair of that model and that many steps can be asked to be nearer.
"""

import argparse
import itertools
import json
import os
import pathlib
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from bench.rows import RESULTS, Row, command, device_name, scrubbed, slug, versions
from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.data.batches import batches
from smedjan_common.data.token_file import TokenFile
from smedjan_common.model.params import initial_params
from smedjan_common.training.config import default_lr
from smedjan_common.training.schedule import learning_rate

WINDOW = 50
GATES = {"torch": 2e-3, "kernels": 2e-3, "float8": 5e-3, "noise": None}
ADDING = threading.Lock()
NAMES = {
    "torch": ["torch", "smedjan"],
    "float8": ["bfloat16", "float8"],
    "kernels": ["plain", "kernels"],
    "noise": ["as drawn", "moved by a rounding"],
}
MEDIUM: Row = {"size": "medium", "steps": 2000, "batch_size": 32, "seq_len": 1024, "dtype": "bfloat16", "mixer": "attention"}
LARGE: Row = {**MEDIUM, "size": "large", "steps": 1000, "batch_size": 8, "seq_len": 2048}
FORMS: Row = {**MEDIUM, "steps": 300, "batch_size": 16}
OURS: Row = {"who": "smedjan", "kernels": "auto", "moved": 0}  # moved: the draw of what initial values are moved by, 0: they are not
# name -> two curves; the first is what the second is held against
PAIRS: dict[str, tuple[Row, Row]] = {
    "torch": ({**MEDIUM, "who": "torch"}, {**MEDIUM, **OURS}),
    "float8 medium": ({**MEDIUM, **OURS}, {**MEDIUM, **OURS, "dtype": "float8"}),
    "float8 large": ({**LARGE, **OURS}, {**LARGE, **OURS, "dtype": "float8"}),
}
for _mixer in ("linear", "ssm", "rwkv", "gated-deltanet"):
    _both = {**FORMS, **OURS, "mixer": _mixer}
    PAIRS[f"kernels {_mixer}"] = {**_both, "kernels": "plain"}, {**_both, "kernels": "pallas"}
PAIRS["noise medium"] = {**MEDIUM, **OURS}, {**MEDIUM, **OURS, "moved": 1}
PAIRS["noise large"] = {**LARGE, **OURS}, {**LARGE, **OURS, "moved": 1}
PAIRS["noise linear"] = PAIRS["kernels linear"][0], {**PAIRS["kernels linear"][0], "moved": 1}
TEST: Row = {"size": "tiny", "steps": 4, "batch_size": 2, "seq_len": 16}


def main() -> None:
    """Train the curves of the pairs that are asked for, one after the other, and compare."""
    args = _arguments()
    if args.task:
        print(json.dumps(curve(json.loads(args.task), args.data)), flush=True)
        return
    lines = args.lines or args.output.with_suffix(".jsonl")
    tasks: list[Row] = []
    for task in itertools.chain.from_iterable(PAIRS[name] for name in args.pairs):
        task = {**task, **(TEST if args.test else {}), **({"steps": args.steps} if args.steps else {})}
        if task not in tasks and not any(_same(task, done) for done in _read(lines)):
            tasks.append(task)
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda task: _train(task, args.data, lines), tasks))
    write(lines, args.output)


def write(lines: pathlib.Path, output: pathlib.Path) -> None:
    """The result file: every curve, and what the pairs come to."""
    rows = _read(lines)
    about = {"command": command(), "window": WINDOW, "gates": GATES}
    output.write_text(json.dumps({**about, "pairs": compared(rows), "rows": rows}, indent=1) + "\n")


def compared(rows: list[Row]) -> list[Row]:
    """Each pair of which both curves are there."""
    found = []
    for name, pair in PAIRS.items():
        curves = [next((row for row in rows if _same({**task, "steps": row["steps"]}, row)), None) for task in pair]
        if all(curves):
            losses = [row["losses"] for row in curves if row]
            found.append({"pair": name, **between(*losses), "gate": GATES[name.split()[0]], **_drawn(name, losses)})
    return found


def between(one: list[float], other: list[float]) -> Row:
    """How far `other` is from `one`, by means over windows of steps."""
    steps = min(len(one), len(other))
    size = _window(steps)
    a, b = (np.asarray(losses[: steps - steps % size]).reshape(-1, size).mean(1) for losses in (one, other))
    off, tenth = b / a - 1, max(1, len(a) // 10)
    last = b[-tenth:].mean() / a[-tenth:].mean() - 1
    return {"steps": steps, "loss": round(float(b[-1]), 4), "largest": float(np.abs(off[tenth:]).max()), "last": float(last)}


def _drawn(name: str, losses: list[list[float]]) -> Row:
    """What the picture shows: means over windows, and what the curves are."""
    names = NAMES[name.split()[0]]
    size = _window(min(map(len, losses)))
    means = [[round(float(np.mean(each[at : at + size])), 5) for at in range(0, len(each) - size + 1, size)] for each in losses]
    return {"names": names, "window": size, "curves": means}


def _window(steps: int) -> int:
    return max(1, min(WINDOW, steps // 10))


def curve(task: Row, data: pathlib.Path) -> Row:
    """The finished row of one training: the loss of every step."""
    tokens = TokenFile.open(data / "train.bin")
    model = ModelConfig.preset(task["size"], vocab_size=tokens.vocab_size, context_length=task["seq_len"], mixer=(task["mixer"],))
    settings = {name: task[name] for name in ("steps", "batch_size", "seq_len", "dtype")} | {"kernels": task.get("kernels", "auto")}
    train = TrainConfig(**settings, lr=default_lr(model.dim), warmup=task["steps"] // 20)
    order, start = batches(tokens, train.seq_len, train.batch_size, train.seed), moved(initial_params(model, 0), task.get("moved", 0))
    step, read, about = (_torch if task["who"] == "torch" else _ours)(model, train, start)
    losses: list[float] = []
    waiting: list[Any] = []
    for number in range(train.steps):
        batch = order.batch(number)
        waiting.append(step(batch.inputs, batch.targets, learning_rate(train, number)))
        if number == 1:
            read(waiting[-1])
            began = time.perf_counter()
        if len(waiting) == 50 or number == train.steps - 1:
            losses += [round(read(each), 5) for each in waiting]
            waiting.clear()
    seconds = (time.perf_counter() - began) / max(1, train.steps - 2)
    return {**task, "parameters": model.num_params(), "dataset": tokens.hash[:16], **about(), "step_seconds": seconds, "losses": losses}


def moved(params: dict[str, np.ndarray], draw: int) -> dict[str, np.ndarray]:
    """Every value times 1 + u / 256, u in [-1, 1]: by no more than bfloat16 rounds to either side. draw 0: as they are."""
    rng = np.random.default_rng(draw)
    by = {name: 1 + rng.uniform(-1, 1, value.shape).astype(np.float32) / 256 for name, value in params.items()} if draw else {}
    return {name: value * by[name] if draw else value for name, value in params.items()}


def _ours(model: ModelConfig, train: TrainConfig, start: dict[str, np.ndarray]) -> Any:
    from smedjan_jax.backend import JaxBackend
    from smedjan_jax.startup import configure

    configure()
    backend = JaxBackend(model, train)
    held = {"state": backend.init(start)}

    def step(inputs: np.ndarray, targets: np.ndarray, lr: float) -> Any:
        held["state"], metrics = backend.train_step(held["state"], inputs, targets, lr)
        return metrics["loss"]

    return step, float, lambda: {"device": backend.describe().name, "runs": backend.describe().kernels, "versions": versions()}


def _torch(model: ModelConfig, train: TrainConfig, start: dict[str, np.ndarray]) -> Any:
    import torch

    from bench.torch_peer import Peer

    peer = Peer(model, train, start)
    about = {"device": torch.cuda.get_device_name(), "versions": {"torch": torch.__version__}}
    return peer.step, float, lambda: about


def _train(task: Row, data: pathlib.Path, lines: pathlib.Path) -> None:
    words = [sys.executable, "-m", "bench.learning_peer", "--data", str(data), "--task", json.dumps(task)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ})
    if done.returncode:
        print(scrubbed(f"failed: {json.dumps(task)}"), file=sys.stderr, flush=True)
        return
    row = json.loads(done.stdout.splitlines()[-1])
    with ADDING, lines.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print({name: row[name] for name in ("who", "size", "dtype", "mixer", "steps", "step_seconds")}, row["losses"][-1], flush=True)


def _read(lines: pathlib.Path) -> list[Row]:
    return [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []


def _same(task: Row, row: Row) -> bool:
    return all(row.get(name) == value for name, value in task.items())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder of train.bin")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--steps", type=int, help="fewer than the pair's own, where time is short")
    parser.add_argument("--jobs", type=int, default=1, help="curves at a time; with several the seconds of a step say nothing")
    parser.add_argument("--test", action="store_true", help="a tiny model, to try the program")
    parser.add_argument("--output", type=pathlib.Path, default=RESULTS / f"curves-{slug(device_name())}.json")
    parser.add_argument("--lines", type=pathlib.Path, help="a file of finished curves, one a line; several programs may add to it")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
