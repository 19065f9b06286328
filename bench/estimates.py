"""What a training step takes, for every mixer and feed-forward: what estimates of memory are held against (test_memory_rows.py).

    python -m bench.estimates                     JAX -> bench/results/estimates-DEVICE.json
    python -m bench.estimates --backend mlx       MLX -> bench/results/estimates-mlx-DEVICE.json

Every row is a process of its own. `planned_bytes`: what the compiler lays out for a step beside the state (JAX); `peak_bytes`: the most
that the allocator held in two steps, state included; `resident_bytes`: how much the process grew in them (its ru_maxrss over what it had
before the state was made). Figures that a device or a framework does not have are left out.
"""

import argparse
import json
import pathlib
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

from bench.rows import Results, Row, default_output, device_name, in_processes, scrubbed
from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.model.config import parse_pattern
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.params import initial_params

KEY = ("backend", "model", "train")
SHAPES: dict[str, Row] = {
    "gpu": {"batch_size": 16, "seq_len": 1024, "dim": 512, "heads": 8, "vocab_size": 4096, "dtype": "bfloat16"},
    "jax": {"batch_size": 4, "seq_len": 512, "dim": 256, "heads": 4, "vocab_size": 1024, "dtype": "float32"},
    "mlx": {"batch_size": 8, "seq_len": 512, "dim": 128, "heads": 4, "vocab_size": 512, "dtype": "float32"},
    "test": {"batch_size": 2, "seq_len": 512, "dim": 32, "heads": 2, "vocab_size": 64, "dtype": "float32"},
}
CHUNKED = ("linear", "ssm", "rwkv", "gated-deltanet")
GROUPED = ("attention", "block-sparse", "linear", "gated-deltanet")
TRAINING = ("gradient_checkpointing", "attention", "chunk_size", "dtype", "batch_size", "seq_len", "grad_accum")


def main() -> None:
    """Measure what is missing, a process per row."""
    args = _arguments()
    if args.backend == "mlx":
        from smedjan_mlx import openblas

        openblas.preload(sys.argv[1:])
    if args.task:
        print(json.dumps(measure(json.loads(args.task))), flush=True)
        return
    gpu = device_name() != "cpu" and args.backend == "jax"
    name = "estimates" if args.backend == "jax" else f"estimates-{args.backend}"
    results = Results(args.output or default_output(name), KEY)
    form = args.form or ("gpu" if gpu else args.backend)
    tasks = [row for options in variations(gpu) if not results.has(row := task(args.backend, form, options))]
    env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}

    def done(task: Row, rows: list[Row]) -> None:
        for row in rows:
            results.add(row)

    in_processes("bench.estimates", tasks, done, args.jobs, args.limit_seconds, env)


def variations(gpu: bool) -> Iterator[Row]:
    """Options of a row, in the order of their worth: every mixer at two depths, then each thing that its memory depends on, changed."""
    others: list[Row] = [{"ffn": "experts", "experts": 8, "expert_dim": 256}]
    everything: list[Row] = [*({"mixer": name} for name in MIXERS), *others]
    for changes in ({}, {"gradient_checkpointing": "full"}, {"gradient_checkpointing": "dots"}):
        for chosen in everything:
            yield {**chosen, "layers": 4, **changes}
            yield {**chosen, "layers": 2, **changes}
    for name in MIXERS:
        yield {"mixer": name, "layers": 4, "fewer_rows": 4}
    for name in GROUPED:
        yield {"mixer": name, "layers": 4, "kv_heads": 2}
    for name in CHUNKED:
        yield {"mixer": name, "layers": 4, "chunk_size": 32}
    yield {"mixer": "attention", "layers": 4, "ffn_mult": 5.33}
    yield {"mixer": "attention", "layers": 4, "vocab_size": 32768}
    yield {"mixer": "attention", "layers": 4, "grad_accum": 4}
    yield {"mixer": "attention", "layers": 4, "window": 128}
    yield {"mixer": "attention", "layers": 4, "qk_norm": True}
    yield {"mixer": "ssm", "layers": 4, "ssm_state": 64}
    yield {"mixer": "ssm", "layers": 4, "ssm_expand": 1}
    yield {"mixer": "rwkv", "layers": 4, "rwkv_head_dim": 32}
    yield {"mixer": "mla", "layers": 4, "mla_q_rank": 128}
    yield {"mixer": "linear", "layers": 4, "linear_normalizer": "denominator", "linear_feature_map": "elu1"}
    yield {"mixer": "block-sparse", "layers": 4, "attention": "plain"}
    yield {"mixer": "block-sparse", "layers": 4, "block_topk": 2}
    yield {"mixer": "block-sparse", "layers": 4, "block_size": 32}
    yield {**others[0], "layers": 4, "experts_per_token": 4}
    yield {**others[0], "layers": 4, "shared_experts": 1}
    yield {"mixer": "attention,ssm,rwkv,linear", "layers": 4}
    if gpu:
        for name in ("attention", "mla"):
            yield {"mixer": name, "layers": 4, "attention": "plain"}
        for name in (*MIXERS, "attention"):
            yield {"mixer": name, "layers": 4, "dtype": "float32"}


def task(backend: str, form: str, options: Row) -> Row:
    """One row's model and training, by name."""
    values = {**SHAPES[form], "mixer": "attention", "ffn": "swiglu", **options}
    share = values.pop("fewer_rows", 1)  # shorter sequences, as many tokens
    values |= {"batch_size": values["batch_size"] * share, "seq_len": values["seq_len"] // share}
    train = {name: values.pop(name) for name in TRAINING if name in values}
    return {"backend": backend, "model": values, "train": train}


def configs(row: Row) -> tuple[ModelConfig, TrainConfig]:
    """The configurations of a row."""
    model, train = dict(row["model"]), dict(row["train"])
    patterns = {name: parse_pattern(model.pop(name)) for name in ("mixer", "ffn")}
    return ModelConfig.build(**model, **patterns, context_length=train["seq_len"]), TrainConfig(steps=10, lr=3e-4, **train)


def measure(task: Row) -> Row:
    """The figures of a row."""
    started = time.perf_counter()
    model, train = configs(task)
    try:
        found = (_mlx if task["backend"] == "mlx" else _jax)(model, train)
    except Exception as error:
        return {**task, "error": scrubbed(f"{type(error).__name__}: {error}".splitlines()[0])}
    return {**task, "parameters": model.num_params(), **found, "seconds": round(time.perf_counter() - started, 1)}


def _jax(model: ModelConfig, train: TrainConfig) -> Row:
    from bench.jax_step import JaxStep

    step = JaxStep(model, train)
    before = _resident()
    step.start(initial_params(model, 0))
    for _ in range(2):
        step()
        step.wait()
    device = step.backend.describe()
    found: Row = {"device": device.kind, "planned_bytes": step.bytes}
    if device.kind == "gpu":
        return found | {"peak_bytes": step.backend.peak_memory()}
    return found | {"resident_bytes": _peak_resident() - before}


def _mlx(model: ModelConfig, train: TrainConfig) -> Row:
    import mlx.core as mx
    import numpy as np

    from smedjan_mlx.backend import MlxBackend

    before = _resident()
    backend = MlxBackend(model, train)
    state: Any = backend.init(initial_params(model, 0))
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (train.batch_size, train.seq_len + 1)).astype(np.int32)
    mx.reset_peak_memory()
    for _ in range(2):
        state, metrics = backend.train_step(state, tokens[:, :-1].copy(), tokens[:, 1:].copy(), train.lr)
        backend.read(metrics)
    return {"device": backend.describe().kind, "peak_bytes": mx.get_peak_memory(), "resident_bytes": _peak_resident() - before}


def _resident() -> int:
    """Bytes that the process holds now."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak_resident() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("jax", "mlx"), default="jax")
    parser.add_argument("--form", choices=SHAPES, help="default: by the device")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--limit-seconds", type=float, default=600)
    parser.add_argument("--output", type=pathlib.Path, help="default: bench/results/estimates-DEVICE.json")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
