"""Tokens per second of a whole model's training step with kernels and with the plain forms, beside attention, in one run.

    python -m bench.kernels                                 -> bench/results/kernels-DEVICE.json
    python -m bench.kernels --layers 4 --seq-lens 8192 32768 --kernels auto --output bench/results/kernel_lengths-DEVICE.json

The preset medium, bfloat16, 65,536 random tokens a step; a step is forward, backward, clipping and AdamW. All steps are compiled first,
side by side, then timed one after the other: the median of three groups of steps.
"""

import argparse
import itertools
import os
import pathlib
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

from bench.jax_step import JaxStep
from bench.rows import Results, Row, default_output, scrubbed
from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.mixers.shared import Chunked
from smedjan_common.training.config import KERNELS
from smedjan_jax.startup import configure

KEY = ("mixer", "kernels", "layers", "seq_len", "batch_size")
MEASURED = ("attention", "linear", "ssm", "rwkv", "gated-deltanet", "block-sparse")
GROUP_SECONDS = 0.5


def main() -> None:
    """Measure what is missing."""
    args = _arguments()
    configure()
    results = Results(args.output or default_output("kernels"), KEY, size=args.size, dtype=args.dtype)
    rows = []
    for mixer, length in itertools.product(args.mixers, args.seq_lens):
        names = args.kernels if MIXERS[mixer].training is Chunked else ["auto"]
        rows += [dict(zip(KEY, (mixer, name, args.layers, length, args.tokens // length), strict=True)) for name in names]
    rows = [row for row in rows if not results.has(row)]
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        steps = [pool.submit(_step, row, args.size, args.dtype) for row in rows]
        for step in steps:
            step.exception()
    for row in rows:
        try:
            row |= _timed(steps.pop(0).result(), row)  # popped, so that its arrays go before the next row's come
        except Exception as error:  # a row that cannot be is a row that says why
            row["error"] = scrubbed(f"{type(error).__name__}: {error}".splitlines()[0])
        results.add(row)


def _step(row: Row, size: str, dtype: str) -> JaxStep:
    layers = {"layers": row["layers"]} if row["layers"] else {}
    model = ModelConfig.preset(size, context_length=row["seq_len"], mixer=(row["mixer"],), **layers)
    options = {"batch_size": row["batch_size"], "seq_len": row["seq_len"], "dtype": dtype, "kernels": row["kernels"]}
    return JaxStep(model, TrainConfig(steps=1000, lr=3e-4, **options))


def _timed(step: JaxStep, row: Row) -> Row:
    step.start()

    def seconds(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            step()
        step.wait()
        return time.perf_counter() - started

    seconds(1)
    count = max(1, round(GROUP_SECONDS / seconds(1)))
    each, tokens = statistics.median(seconds(count) for _ in range(3)) / count, row["batch_size"] * row["seq_len"]
    return {
        "runs": step.backend.describe().kernels,
        "tokens_per_second": round(tokens / each),
        "milliseconds_per_step": round(each * 1e3, 3),
        "bytes_per_token": round(step.bytes / tokens),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=MEASURED)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=["plain", "pallas"])
    parser.add_argument("--size", default="medium")
    parser.add_argument("--layers", type=int, default=0, help="default: the preset's")
    parser.add_argument("--seq-lens", nargs="+", type=int, default=[1024])
    parser.add_argument("--tokens", type=int, default=65536, help="of a step")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=pathlib.Path, help="default: bench/results/kernels-DEVICE.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
