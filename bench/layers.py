"""What one layer's mixer costs: forward, and forward with backward, of every mixer by itself, plain forms beside kernels in one run.

    python -m bench.layers                                  -> bench/results/layers-DEVICE.json
    python -m bench.layers --mixers linear --widths 512 --lengths 1024 8192

The tokens are the same at every length, so sequences get longer and fewer. A mixer is all of it: projections, convolution, core, norm,
gate, output; weights float32, activations in the compute dtype. `bytes_per_token` is what XLA lays out for forward and backward beside
arguments and results. Everything is compiled first, side by side, then timed one after the other: the median of three groups of calls.
"""

import argparse
import itertools
import os
import pathlib
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.rows import Results, Row, default_output, scrubbed
from smedjan_common.config import ModelConfig
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.mixers.shared import Chunked
from smedjan_common.model.params import initial_params
from smedjan_jax.mixers import mixer_class
from smedjan_jax.modules import Context, Rope
from smedjan_jax.startup import configure

KEY = ("mixer", "width", "head_dim", "length", "implementation")
GROUP_SECONDS = 0.05


def main() -> None:
    """Measure what is missing."""
    args = _arguments()
    configure()
    on_gpu = jax.default_backend() == "gpu"
    output = args.output or default_output("layers")
    about = {"tokens": args.tokens, "dtype": args.dtype}
    results, rows = Results(output, KEY, **about), []
    for mixer, width, size in itertools.product(args.mixers or MIXERS, args.widths, args.head_dims):
        names = ("plain", "pallas") if MIXERS[mixer].training is Chunked and on_gpu else ("auto",)
        rows += [dict(zip(KEY, (mixer, width, size, length, name), strict=True)) for length in args.lengths for name in names]
    rows = [row for row in rows if not results.has(row)]
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 2)) as pool:
        compiled = [pool.submit(_compiled, row, args.tokens, args.dtype) for row in rows]
        for future in compiled:
            future.exception()
    for row, future in zip(rows, compiled, strict=True):
        try:
            row |= _measured(*future.result(), args.tokens)
        except Exception as error:  # a row that cannot be is a row that says why
            row["error"] = scrubbed(f"{type(error).__name__}: {error}".splitlines()[0])
        results.add(row)


def model_of(row: Row) -> ModelConfig:
    """A model of one such layer."""
    width, size = row["width"], row["head_dim"]
    options = {"rwkv": {"rwkv_head_dim": size}, "ssm": {"ssm_head_dim": size}}.get(row["mixer"], {})
    return ModelConfig.build(
        vocab_size=64, dim=width, layers=1, heads=max(1, width // size), mixer=(row["mixer"],), context_length=row["length"], **options
    )


def _compiled(row: Row, tokens: int, dtype: str) -> tuple[Any, Any, tuple[Any, ...]]:
    """Forward, forward with backward, and the shapes of their arguments."""
    model, prefix = model_of(row), "layers.0.mixer"
    host = {name: value for name, value in initial_params(model, 0).items() if name.startswith(prefix)}
    x = jax.ShapeDtypeStruct((tokens // row["length"], row["length"], model.dim), jnp.dtype(dtype))

    def forward(params: Any, x: jax.Array) -> jax.Array:
        mixer = mixer_class(row["mixer"])(model, params, prefix, row["implementation"])
        return mixer(x, Context(Rope(model, x.shape[1]), None, None, 64), {})[0]

    def both(params: Any, x: jax.Array, cotangent: jax.Array) -> Any:
        return jax.vjp(forward, params, x)[1](cotangent)

    shapes = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in host.items()}
    return jax.jit(forward).lower(shapes, x).compile(), jax.jit(both).lower(shapes, x, x).compile(), (host, x)


def _measured(forward: Any, both: Any, arguments: tuple[Any, ...], tokens: int) -> Row:
    params = jax.device_put(arguments[0])
    x, cotangent = (
        jnp.asarray(np.random.default_rng(seed).standard_normal(arguments[1].shape, dtype=np.float32), arguments[1].dtype)
        for seed in (0, 1)
    )
    return {
        "forward_ms": _milliseconds(forward, params, x),
        "forward_backward_ms": _milliseconds(both, params, x, cotangent),
        "bytes_per_token": round(both.memory_analysis().temp_size_in_bytes / tokens),
    }


def _milliseconds(function: Any, *arguments: Any) -> float:
    def seconds(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            out = function(*arguments)
        jax.block_until_ready(out)
        return time.perf_counter() - started

    seconds(1)
    count = max(1, round(GROUP_SECONDS / seconds(1)))
    return round(statistics.median(seconds(count) for _ in range(3)) / count * 1e3, 4)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, help="default: every row of the table")
    parser.add_argument("--widths", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64])
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 8192, 32768])
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output", type=pathlib.Path, help="default: bench/results/layers-DEVICE.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
