"""Tokens per second of a training step with experts: every implementation of the grouped matmul, 8 against 64 experts.

    python -m bench.experts                                  JAX on what there is -> bench/results/experts-DEVICE.json
    python -m bench.experts --backend mlx --experts 8
    python -m bench.experts --implementations blocks --blocks 128 256 512

A token goes to 2 experts, so 8 and 64 of them have the same active parameters, and so has the dense model beside them, whose
feed-forward is as wide as two experts: what is lost against it is the cost of routing. On a GPU the rest is the preset medium in
bfloat16, 32 x 1024 tokens; on a CPU a stack of width 128 in float32, 8 x 128 tokens. A step is forward, backward, clipping and AdamW, on
random tokens; the figure is the median of groups of steps. `plain` multiplies every row by every expert: it is left out, as in use.
"""

import argparse
import importlib
import pathlib
import statistics
import sys
import time
from typing import Any, NamedTuple

import numpy as np

from bench.rows import Results, Row, default_output, device_name, scrubbed
from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.model.ffns import experts as row
from smedjan_common.model.flops import active_params, peak_flops, train_flops_per_token
from smedjan_common.model.params import initial_params
from smedjan_mlx import openblas

KEY = ("backend", "experts", "implementation", "largest_block")
GROUPS = 5


class Form(NamedTuple):
    """The model of a device, the tokens of a step, and how many steps are timed at once."""

    size: str
    dim: int
    layers: int
    heads: int
    expert_dim: int
    batch_size: int
    seq_len: int
    dtype: str
    steps: int


FORMS = {
    "gpu": Form("medium", 512, 12, 8, 768, 32, 1024, "bfloat16", 5),
    "cpu": Form("small stack", 128, 2, 4, 256, 8, 128, "float32", 2),
    "test": Form("test", 32, 1, 2, 32, 2, 16, "float32", 1),
}


def main() -> None:
    """Measure what is missing, one row after the other."""
    args = _arguments()
    if args.backend == "mlx":
        openblas.preload(sys.argv[1:])
    form = FORMS[args.device or ("cpu" if device_name() == "cpu" else "gpu")]
    results = Results(args.output or default_output("experts"), KEY, form=form._asdict())
    for task in tasks(args):
        if not results.has(task):
            results.add(measure(task, form))


def tasks(args: argparse.Namespace) -> list[Row]:
    """The dense model, then every number of experts in every implementation and block."""
    module = importlib.import_module(f"smedjan_{args.backend}.grouped_matmul")
    names = args.implementations or [name for name in module.IMPLEMENTATIONS if name != "plain"]
    base = {"backend": args.backend, "experts": 0, "implementation": None, "largest_block": None}
    found = [base]
    for experts in args.experts:
        for name in names:
            blocks = [None] if name in module.UNBLOCKED else args.blocks
            found += [{**base, "experts": experts, "implementation": name, "largest_block": block} for block in blocks]
    return found


def measure(task: Row, form: Form) -> Row:
    """The row of one task; an error is its text, so that one implementation that fails costs no other."""
    model, train = configs(task["experts"], form)
    try:
        seconds = step_seconds(task, model, train, form.steps)
    except Exception as error:
        return {**task, "error": scrubbed(f"{type(error).__name__}: {error}")}
    tokens = train.batch_size * train.seq_len
    flops, peak = tokens * train_flops_per_token(model, train.seq_len) / seconds, peak_flops(device_name())
    figures = {
        "step_ms": round(1e3 * seconds, 3),
        "tokens_per_second": round(tokens / seconds),
        "mfu": round(flops / peak, 4) if peak else None,
    }
    return {**task, "parameters": model.num_params(), "active_parameters": active_params(model), **figures}


def configs(experts: int, form: Form) -> tuple[ModelConfig, TrainConfig]:
    """The model with that many experts (0: dense, as wide as two of them) and its training."""
    routed = {"ffn": ("experts",), "experts": experts, "expert_dim": form.expert_dim} if experts else {}
    shape: dict[str, Any] = {"dim": form.dim, "layers": form.layers, "heads": form.heads, "ffn_dim": 2 * form.expert_dim}
    model = ModelConfig.build(vocab_size=8192, **shape, context_length=form.seq_len, **routed)
    train = TrainConfig(steps=1000, batch_size=form.batch_size, seq_len=form.seq_len, lr=1e-4, dtype=form.dtype)
    return model, train


def step_seconds(task: Row, model: ModelConfig, train: TrainConfig, steps: int) -> float:
    """Seconds of a step: the median of groups, after the steps that compile."""
    package = f"smedjan_{task['backend']}"
    if task["implementation"]:
        setattr(importlib.import_module(f"{package}.experts"), "preferred_implementation", lambda: task["implementation"])  # noqa: B010
    row.LARGEST_BLOCK = task["largest_block"] or 1
    backend = getattr(importlib.import_module(f"{package}.backend"), {"jax": "JaxBackend", "mlx": "MlxBackend"}[task["backend"]])(
        model, train
    )
    rng = np.random.default_rng(0)
    inputs, targets = rng.integers(0, model.vocab_size, (2, train.batch_size, train.seq_len), dtype=np.int32)
    state = backend.init(initial_params(model, 0))
    times = []
    for group in range(GROUPS + 1):
        begun = time.perf_counter()
        for _ in range(steps):
            state, metrics = backend.train_step(state, inputs, targets, 1e-4)
        backend.read(metrics)
        if group:
            times.append((time.perf_counter() - begun) / steps)
    return statistics.median(times)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", choices=("jax", "mlx"), default="jax")
    parser.add_argument("--device", choices=tuple(FORMS), help="which model and tokens (default: those of this machine)")
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--implementations", nargs="+", help="(default: all but plain)")
    parser.add_argument("--blocks", type=int, nargs="+", default=[row.LARGEST_BLOCK], help="largest number of rows of a block")
    parser.add_argument("--output", type=pathlib.Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
