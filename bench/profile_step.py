"""Where a JAX training step's time goes on a GPU: kernel times from the profiler's trace, summed by kernel name.

python bench/profile_step.py --size medium --batch-size 64 --seq-len 1024
"""

import argparse
import collections
import glob
import gzip
import json
import re
import tempfile

import jax
import numpy as np

from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.model.params import initial_params
from smedjan_jax.backend import JaxBackend

STEPS = 3


def main() -> None:
    """Print milliseconds a step per kernel, largest first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="medium")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=40)
    args = parser.parse_args()
    model = ModelConfig.preset(args.size, vocab_size=args.vocab_size, context_length=args.seq_len)
    train = TrainConfig(steps=100, batch_size=args.batch_size, seq_len=args.seq_len, lr=3e-4, dtype="bfloat16")
    backend = JaxBackend(model, train)
    state = backend.init(initial_params(model, 0))
    batch = np.random.default_rng(0).integers(0, model.vocab_size, (args.batch_size, args.seq_len + 1)).astype(np.int32)
    for _ in range(3):
        state, metrics = backend.train_step(state, batch[:, :-1], batch[:, 1:], 3e-4)
    backend.read(metrics)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            for _ in range(STEPS):
                state, metrics = backend.train_step(state, batch[:, :-1], batch[:, 1:], 3e-4)
            backend.read(metrics)
        (path,) = glob.glob(f"{folder}/**/perfetto_trace.json.gz", recursive=True)
        with gzip.open(path) as file:
            events = json.load(file)["traceEvents"]
    _print_kernels(events, args.rows)


def _print_kernels(events: list[dict], rows: int) -> None:
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
    print(f"sum of kernels: {sum(times.values()):.2f} ms a step")
    for name, milliseconds in times.most_common(rows):
        print(f"{milliseconds:8.3f} ms  {counts[name] // STEPS:4d} x  {name[:110]}")


if __name__ == "__main__":
    main()
