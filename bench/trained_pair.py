"""What a draft gains where both models were trained: tokens per second with and without it, and how often it is right.

    python -m bench.trained_pair            on a GPU: trains medium and tiny for 600 steps -> bench/results/trained_pair-DEVICE.json
    python -m bench.trained_pair --form test    the same in small, to see that it runs

Both learn the running interpreter's standard library with one tokenizer, side by side on the device, by the commands that a user would
give, into `--folder` (docs/generate.md shows the table). What is there already is not trained again: its target is also what
`python -m bench.quantized FOLDER/target --data FOLDER/val.bin` measures. The prompts are held-out text. A model alone and one with its
draft take turns, `--repeats` times; the best of each counts. The loss of each over the held-out tokens is that of its last validation.
"""

import argparse
import importlib
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from bench.rows import ROOT, Results, Row, default_output, device_name
from smedjan_common.data.prepare import prepare
from smedjan_common.data.token_file import TokenFile
from smedjan_common.inference.engine import Engine
from smedjan_common.inference.opened import Load, OpenModel
from smedjan_common.inference.request import Request
from smedjan_common.inference.sampling import Sampling
from smedjan_common.reporting.metrics import eval_rows, read_rows
from smedjan_common.text.corpus import standard_library
from smedjan_common.tokenizer import Tokenizer

FORMS: dict[str, Row] = {
    "gpu": {
        "target": {"size": "medium", "lr": 1e-3},
        "draft": {"size": "tiny", "lr": 4e-3},
        "vocab_size": 8192,
        "files": 0,
        "training": {"steps": 600, "batch_size": 32, "seq_len": 512, "warmup": 60},
        "prompt": 64,
        "tokens": 256,
    },
    "test": {
        "target": {"size": "tiny", "lr": 1e-3},
        "draft": {"size": "tiny", "lr": 1e-3, "layers": 1},
        "vocab_size": 300,
        "files": 3,
        "training": {"steps": 2, "batch_size": 2, "seq_len": 32, "warmup": 0},
        "prompt": 4,
        "tokens": 12,
    },
}


def main() -> None:
    """Train what is missing in the folder, and measure what is missing in the result file."""
    args = _arguments()
    form = FORMS[args.form]
    began = time.perf_counter()
    corpus = train(args.folder, form, args.backend)
    print(f"trained in {time.perf_counter() - began:.0f} s", flush=True)
    settings = {"form": form, "corpus": corpus, "repeats": args.repeats, "validation": validation(args.folder)}
    results = Results(args.output or default_output("trained_pair"), ("backend", "rows", "temperature", "ahead"), **settings)
    if args.train_only:
        return
    for rows, temperature, ahead in itertools.product(args.rows, args.temperature, args.ahead):
        case = {"backend": args.backend, "rows": rows, "temperature": temperature, "ahead": ahead}
        if not results.has(case):
            results.add(case | measured(args, form, rows, temperature, ahead))


def train(folder: Path, form: Row, backend: str) -> str:
    """Tokenizer, token files and both runs in `folder`; a sentence about the text. Raises CalledProcessError when a training fails."""
    corpus = standard_library()
    files = corpus.paths[: form["files"] or None]
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "train.bin").exists():
        tokenizer = Tokenizer.train(files, form["vocab_size"])
        tokenizer.save(folder / "tokenizer.json")
        prepare(files, folder / "train.bin", tokenizer, val_output=folder / "val.bin", val_fraction=0.05)
    runs = [_training(folder, name, form, backend) for name in ("target", "draft") if not (folder / name / "final").exists()]
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # two processes on one device
    running = [subprocess.Popen(command, cwd=ROOT, env=environment) for command in runs]
    for command, process in zip(runs, running, strict=True):
        if code := process.wait():
            raise subprocess.CalledProcessError(code, command)
    return corpus.description


def _training(folder: Path, name: str, form: Row, backend: str) -> list[str]:
    rare = {"checkpoint_every": 0, "eval_every": form["training"]["steps"], "eval_batches": 8, "log_every": 50, "sample_every": 0}
    flags = {**form["training"], **form[name], **rare}
    words = [f"--{flag.replace('_', '-')}={value}" for flag, value in flags.items()]
    data = ["--dataset", str(folder / "train.bin"), "--val-dataset", str(folder / "val.bin"), "--checkpoint-dir", str(folder / name)]
    return [sys.executable, "-m", f"smedjan_{backend}.train", *data, *words]


def validation(folder: Path) -> dict[str, float]:
    """The last validation loss of each run, in nats a token."""
    return {name: round(eval_rows(read_rows(folder / name))[-1]["val_loss"], 4) for name in ("target", "draft")}


def measured(args: argparse.Namespace, form: Row, rows: int, temperature: float, ahead: int) -> Row:
    """One row of the table."""
    target, draft = args.folder / "target", args.folder / "draft"
    opened = [OpenModel(target), OpenModel(target, draft, ahead)]
    held_out = np.asarray(TokenFile.open(args.folder / "val.bin").tokens)
    starts = np.linspace(0, len(held_out) - form["prompt"], rows, dtype=int, endpoint=False)
    prompts = [held_out[start : start + form["prompt"]].tolist() for start in starts]
    engines = []
    for model in opened:
        model.use(args.backend, _load(args.backend), args.dtype)
        engines.append(model.engine(rows, form["prompt"], form["tokens"]))
    for engine in engines:
        _seconds(engine, prompts, form["tokens"], temperature)  # compiles
        engine.stats.drafted_tokens = engine.stats.accepted_tokens = 0
    times = [[_seconds(engine, prompts, form["tokens"], temperature) for engine in engines] for _ in range(args.repeats)]
    alone, drafted = (min(its) for its in zip(*times, strict=True))
    stats, drawn = engines[1].stats, rows * form["tokens"]
    smaller = opened[1].draft
    assert smaller
    return {
        "dtype": opened[0].dtype,
        "parameters": opened[0].model.num_params(),
        "draft_parameters": smaller.model.num_params(),
        "right": round(stats.accepted_tokens / max(stats.drafted_tokens, 1), 3),
        "tokens_per_second_alone": round(drawn / alone, 1),
        "tokens_per_second": round(drawn / drafted, 1),
    }


def _seconds(engine: Engine, prompts: list[list[int]], tokens: int, temperature: float) -> float:
    asked = [
        Request(tuple(prompt), tokens, Sampling(temperature=temperature, seed=row), ignore_eot=True) for row, prompt in enumerate(prompts)
    ]
    began = time.perf_counter()
    for _ in engine.run(asked):
        pass
    return time.perf_counter() - began


def _load(name: str) -> Load:
    def load():
        module = importlib.import_module(f"smedjan_{name}.backend")
        return getattr(module, {"jax": "JaxBackend", "mlx": "MlxBackend"}[name]), module.default_dtype()

    return load


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("jax", "mlx"), default="jax")
    parser.add_argument("--form", choices=FORMS, default="test" if device_name() == "cpu" else "gpu")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "trained-pair")
    parser.add_argument("--train-only", action="store_true", help="measure nothing")
    parser.add_argument("--dtype", default="auto", help="to infer in; auto: bfloat16 on a GPU")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--ahead", type=int, nargs="+", default=[4])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
