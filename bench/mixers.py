"""What a token costs with each mixer: time and memory of a training step from short to long sequences, and tokens/s at medium.

    python -m bench.mixers                              every mixer with JAX -> bench/results/mixers-DEVICE.json
    python -m bench.mixers --backend mlx --mixers linear ssm

Table `length`: the tokens of a step stay the same while the sequences get longer and fewer, so whatever grows is the mixer. On a GPU
4 layers of width 512 in bfloat16, 64k tokens, T from 1k to 32k; on a CPU 2 layers of width 128 in float32, 4k tokens, T from 256 to 4k.
Table `medium` (GPU only): the preset, 64 x 1024. A step is forward, backward, clipping and AdamW, on random tokens.

Memory is what the step takes beside parameters and optimizer: with JAX as XLA lays its buffers out, with MLX the measured peak.
Every mixer has a process of its own, which compiles all its shapes at once and then times one after the other.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from bench.rows import Results, Row, default_output, device_name, in_processes, scrubbed
from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.model.config import parse_pattern
from smedjan_common.model.flops import train_flops_per_token
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.params import initial_params
from smedjan_mlx import openblas

GROUPS = 3
TABLES = ("length", "medium")
KEY = ("table", "backend", "mixer", "seq_len", "batch_size")


class Form(NamedTuple):
    """The shapes of a device: the stack of table `length`, its tokens per step and lengths, and whether `medium` is measured."""

    dim: int
    layers: int
    heads: int
    tokens: int
    lengths: tuple[int, ...]
    dtype: str
    medium: bool


FORMS = {
    "gpu": Form(512, 4, 8, 65536, (1024, 2048, 4096, 8192, 16384, 32768), "bfloat16", True),
    "cpu": Form(128, 2, 4, 4096, (256, 512, 1024, 2048, 4096), "float32", False),
    "test": Form(64, 1, 2, 128, (64, 128), "float32", False),
}


def main() -> None:
    """Measure what is missing, a process per mixer."""
    args = _arguments()
    if args.backend == "mlx":
        openblas.preload(sys.argv[1:])
    if args.task:
        measure(json.loads(args.task))
        return
    form = args.form or ("cpu" if device_name() == "cpu" else "gpu")
    output = args.output or default_output("mixers" if args.backend == "jax" else f"mixers-{args.backend}")
    results = Results(output, KEY, **FORMS[form]._asdict() | {"lengths": list(FORMS[form].lengths)})
    tasks = []
    for mixer in args.mixers or MIXERS:
        rows = [row for row in shapes(mixer, args.backend, FORMS[form]) if row["table"] in args.tables and not results.has(row)]
        if rows:
            tasks.append({"mixer": mixer, "backend": args.backend, "form": form, "rows": rows})

    def done(task: Row, rows: list[Row]) -> None:
        for row in rows:
            results.add({name: value for name, value in row.items() if name != "rows"})

    in_processes("bench.mixers", tasks, done, jobs=1, seconds=args.limit_seconds)


def shapes(mixer: str, backend: str, form: Form) -> list[Row]:
    """The keys of a mixer's rows."""
    rows = [("length", length, form.tokens // length) for length in form.lengths] + ([("medium", 1024, 64)] if form.medium else [])
    return [dict(zip(KEY, (table, backend, mixer, length, batch), strict=True)) for table, length, batch in rows]


def measure(task: Row) -> None:
    """Compile and time the rows of one mixer, each printed as JSON when it is done."""
    form = FORMS[task["form"]]
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        prepared = [pool.submit(_prepare, row, form) for row in task["rows"]]
        for future in prepared:
            future.exception()  # all are compiled before the first is timed
    for row in task["rows"]:
        try:
            row |= _timed(*prepared.pop(0).result())  # popped, so that its arrays go before the next row's come
        except Exception as error:  # a row that cannot be is a row that says why
            row["error"] = scrubbed(f"{type(error).__name__}: {error}".splitlines()[0])
        print(json.dumps(row), flush=True)


def configs(row: Row, form: Form) -> tuple[ModelConfig, TrainConfig]:
    """The model and the training of a row."""
    options: Row = {"context_length": row["seq_len"], "mixer": parse_pattern(row["mixer"])}
    if row["table"] == "medium":
        model = ModelConfig.preset("medium", **options)
    else:
        model = ModelConfig.build(vocab_size=8192, dim=form.dim, layers=form.layers, heads=form.heads, **options)
    return model, TrainConfig(steps=1000, batch_size=row["batch_size"], seq_len=row["seq_len"], lr=3e-4, dtype=form.dtype)


def _prepare(row: Row, form: Form) -> tuple[ModelConfig, TrainConfig, Any]:
    """The configuration of a row and its compiled training step."""
    model, train = configs(row, form)
    if row["backend"] == "mlx":
        return model, train, MlxStep(model, train)
    from bench.jax_step import JaxStep

    return model, train, JaxStep(model, train)


def _timed(model: ModelConfig, train: TrainConfig, step: Any) -> Row:
    step.start(initial_params(model, 0))
    _seconds(step, 1)
    count = max(1, round(0.3 / _seconds(step, 1)))
    seconds = statistics.median(_seconds(step, count) for _ in range(GROUPS)) / count
    tokens = train.batch_size * train.seq_len
    return {
        "parameters": model.num_params(),
        "tokens_per_second": round(tokens / seconds),
        "microseconds_per_token": round(seconds / tokens * 1e6, 4),
        "bytes_per_token": round(step.bytes / tokens),
        "tflops_causal_once": round(tokens / seconds * train_flops_per_token(model, train.seq_len) / 1e12, 2),
    }


def _seconds(step: Any, count: int) -> float:
    started = time.perf_counter()
    for _ in range(count):
        step()
    step.wait()
    return time.perf_counter() - started


class MlxStep:
    """The twin of bench.jax_step.JaxStep; MLX compiles at its first step, so the first one belongs to `start`."""

    def __init__(self, model: ModelConfig, train: TrainConfig):
        from smedjan_mlx.backend import MlxBackend

        self.backend, self.bytes = MlxBackend(model, train), 0
        self._batch = np.random.default_rng(0).integers(0, model.vocab_size, (2, train.batch_size, train.seq_len)).astype(np.int32)
        self._state: Any = None
        self._metrics: Any = None

    def start(self, params: dict[str, np.ndarray]) -> None:
        """Put the state on the device and measure the peak of the first step."""
        import mlx.core as mx

        self._state = self.backend.init(params)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        self()
        self.wait()
        self.bytes = mx.get_peak_memory() - before

    def __call__(self) -> None:
        """One step; returns at once."""
        self._state, self._metrics = self.backend.train_step(self._state, *self._batch, self.backend.train.lr)

    def wait(self) -> None:
        """Until the device is done."""
        import mlx.core as mx

        mx.eval(self._state, self._metrics)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("jax", "mlx"), default="jax")
    parser.add_argument("--mixers", nargs="+", metavar="PATTERN", help="default: every row of the table")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--form", choices=FORMS, help="default: by the device")
    parser.add_argument("--limit-seconds", type=float, default=240)
    parser.add_argument("--output", type=pathlib.Path, help="default: bench/results/mixers-DEVICE.json")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
