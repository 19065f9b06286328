"""What saves memory and what it costs: gradient checkpointing, gradient accumulation and the chunks of the loss, on one device.

    python -m bench.memory              xxl at 16 x 2048 and medium at 64 x 1024 -> bench/results/memory-DEVICE.json

Every row is a process of its own, so its peak is its own; one that runs out of memory is a row that says so. Where the device is a
GPU, the rows are compiled first, several at a time, into XLA's cache: that takes no part in what is measured.
Logits: how many chunks the loss takes, or whole. Weights are random numbers made on the device; a step is a whole training step.
"""

import argparse
import json
import pathlib
import statistics
import time

from bench.rows import Results, Row, default_output, device_name, in_processes, scrubbed
from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.errors import OutOfMemoryError
from smedjan_common.model.config import parse_pattern
from smedjan_common.training import memory

KEY = ("size", "mixer", "batch_size", "seq_len", "gradient_checkpointing", "grad_accum", "logits")
SHAPES: dict[str, tuple[Row, ...]] = {
    "gpu": (
        {"size": "xxl", "vocab_size": 32768, "batch_size": 16, "seq_len": 2048},
        {"size": "medium", "vocab_size": 8192, "batch_size": 64, "seq_len": 1024},
    ),
    "cpu": ({"size": "tiny", "vocab_size": 8192, "batch_size": 4, "seq_len": 256},),
    "test": ({"size": "tiny", "vocab_size": 64, "batch_size": 4, "seq_len": 16},),
}
# (gradient checkpointing, gradient accumulation, logits): what users would try first comes first
OPTIONS = (
    ("none", 1, "default"),
    ("full", 1, "default"),
    ("dots", 1, "default"),
    ("none", 4, "default"),
    ("full", 4, "default"),
    ("full", 1, "whole"),
    ("full", 1, "16 chunks"),
    ("dots", 4, "default"),
    ("none", 1, "whole"),
)
WHOLE = 1 << 62


def main() -> None:
    """Compile what is missing, then measure it, a process per row."""
    args = _arguments()
    if args.task:
        task = json.loads(args.task)
        print(json.dumps(measure(task)), flush=True)
        return
    form = args.form or ("cpu" if device_name() == "cpu" else "gpu")
    results = Results(args.output or default_output("memory"), KEY)
    rows = [
        {**shape, "mixer": args.mixer, **dict(zip(KEY[4:], options, strict=True))}
        for shape in SHAPES[form]
        if not args.sizes or shape["size"] in args.sizes
        for options in OPTIONS
    ]
    tasks = [{**row, "compile_only": False} for row in rows if not results.has(row)]
    started = time.monotonic()
    if form == "gpu" and args.compile_jobs:

        def compiled(task: Row, rows: list[Row]) -> None:
            print("compiled" if "error" not in rows[-1] else "not compiled", json.dumps(rows[-1]), flush=True)

        env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        ahead = [{**task, "compile_only": True} for task in tasks]
        in_processes("bench.memory", ahead, compiled, args.compile_jobs, args.limit_seconds / 2, env)

    def done(task: Row, rows: list[Row]) -> None:
        for row in rows:
            results.add({name: value for name, value in row.items() if name != "compile_only"})

    in_processes("bench.memory", tasks, done, 1, args.limit_seconds - (time.monotonic() - started))


def measure(task: Row) -> Row:
    """Compile the step of a row and, unless that is all, time it and ask for the peak."""
    started, held = time.perf_counter(), memory.LOGITS_BYTES
    try:
        return {**task, **_measure(task, started)}
    except OutOfMemoryError:
        return {**task, "out_of_memory": True}
    except Exception as error:  # XLA finds out while compiling, too
        if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
            return {**task, "error": scrubbed(f"{type(error).__name__}: {error}".splitlines()[0])}
        return {**task, "out_of_memory": True}
    finally:
        memory.LOGITS_BYTES = held  # what else runs in this process has the default again


def _measure(task: Row, started: float) -> Row:
    from bench.jax_step import JaxStep
    from smedjan_jax.backend import default_dtype

    model = ModelConfig.preset(
        task["size"], vocab_size=task["vocab_size"], context_length=task["seq_len"], mixer=parse_pattern(task["mixer"])
    )
    shape = (task["batch_size"], task["seq_len"])
    options = {name: task[name] for name in ("gradient_checkpointing", "grad_accum")}
    train = TrainConfig(1000, *shape, 3e-4, dtype=default_dtype(), **options)
    tokens, vocab = task["batch_size"] // task["grad_accum"] * task["seq_len"], model.padded_vocab_size
    memory.LOGITS_BYTES = {"default": memory.LOGITS_BYTES, "whole": WHOLE, "16 chunks": tokens * vocab * 4 // 16}[task["logits"]]
    step = JaxStep(model, train)
    found = {"loss_chunks": memory.loss_chunks(tokens, vocab), "parameters": model.num_params()}
    if task["compile_only"]:
        return found | {"seconds": round(time.perf_counter() - started, 1)}
    step.start()
    groups = []
    for _ in range(4):
        begun = time.perf_counter()
        step()
        step()
        step.wait()
        groups.append((time.perf_counter() - begun) / 2)
    seconds = statistics.median(groups[1:])
    return found | {
        "dtype": train.dtype,
        "tokens_per_second": round(shape[0] * shape[1] / seconds),
        "milliseconds_per_step": round(seconds * 1e3, 2),
        "peak_memory_bytes": step.backend.peak_memory(),
        "planned_step_bytes": step.bytes,
        "estimated_bytes": memory.training_bytes(model, train),
        "device": step.backend.describe().name,
        "seconds": round(time.perf_counter() - started, 1),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixer", default="attention", metavar="PATTERN")
    parser.add_argument("--sizes", nargs="+", help="default: all of the device's")
    parser.add_argument("--form", choices=SHAPES, help="default: by the device")
    parser.add_argument("--compile-jobs", type=int, default=4, help="processes that compile at a time, on a GPU; 0: no compilation ahead")
    parser.add_argument("--limit-seconds", type=float, default=240)
    parser.add_argument("--output", type=pathlib.Path, help="default: bench/results/memory-DEVICE.json")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
