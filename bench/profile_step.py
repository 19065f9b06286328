"""Where a JAX training step's time goes on a GPU: kernel times from the profiler's trace, summed by kernel name.

    python -m bench.profile_step --size medium --batch-size 64 --seq-len 1024
    python -m bench.profile_step --mixers ssm rwkv --layers 4 --output profile.json

Several mixers are compiled side by side and traced one after the other.
"""

import argparse
import collections
import glob
import gzip
import json
import os
import pathlib
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from bench.jax_step import JaxStep
from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.model.mixers import MIXERS
from smedjan_common.training.config import KERNELS
from smedjan_common.training.precision import PRECISIONS
from smedjan_jax.backend import configure

STEPS = 3


def main() -> None:
    """Print milliseconds a step per kernel, largest first."""
    args = _arguments()
    configure()
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        steps = [pool.submit(_step, mixer, args) for mixer in args.mixers]
    found = {}
    for mixer in args.mixers:
        found[mixer] = _traced(steps.pop(0).result())  # popped, so that its arrays go before the next one's come
        print(f"\n{mixer}: sum of kernels {sum(row['milliseconds'] for row in found[mixer]):.2f} ms a step")
        for row in found[mixer][: args.rows]:
            print(f"{row['milliseconds']:8.3f} ms  {row['calls']:4d} x  {row['kernel'][:110]}")
    if args.output:
        args.output.write_text(json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__, "kernels": found}, indent=1))


def _step(mixer: str, args: argparse.Namespace) -> JaxStep:
    sizes = {"vocab_size": args.vocab_size, "context_length": args.seq_len} | ({"layers": args.layers} if args.layers else {})
    model = ModelConfig.preset(args.size, mixer=(mixer,), **sizes)
    options = {"batch_size": args.batch_size, "seq_len": args.seq_len, "dtype": args.dtype, "kernels": args.kernels}
    return JaxStep(model, TrainConfig(steps=100, lr=3e-4, **options))


def _traced(step: JaxStep) -> list[dict[str, Any]]:
    """Kernels of a step, largest first: name, milliseconds and calls a step."""
    step.start()
    for _ in range(3):
        step()
    step.wait()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            for _ in range(STEPS):
                step()
            step.wait()
        (path,) = glob.glob(f"{folder}/**/perfetto_trace.json.gz", recursive=True)
        with gzip.open(path) as file:
            return _kernels(json.load(file)["traceEvents"])


def _kernels(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    streams = {
        (e["pid"], e.get("tid"))
        for e in events
        if e.get("ph") == "M" and e.get("name") == "thread_name" and e["args"]["name"].startswith("Stream")
    }
    times, counts = collections.Counter(), collections.Counter()
    for event in events:
        if event.get("ph") == "X" and (event["pid"], event.get("tid")) in streams:
            name = re.sub(r"[._]\d+$", "", event["name"])
            times[name] += event["dur"] / 1e3 / STEPS
            counts[name] += 1
    return [{"kernel": name, "milliseconds": round(each, 4), "calls": counts[name] // STEPS} for name, each in times.most_common()]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="medium")
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=["attention"])
    parser.add_argument("--kernels", choices=KERNELS, default="auto")
    parser.add_argument("--dtype", choices=PRECISIONS, default="bfloat16")
    parser.add_argument("--layers", type=int, default=0, help="default: the preset's")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=40, help="kernels printed")
    parser.add_argument("--output", type=pathlib.Path, help="all of them, as JSON")
    return parser.parse_args()


if __name__ == "__main__":
    main()
