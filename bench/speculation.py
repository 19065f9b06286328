"""What a draft gains: tokens per second with and without one, by how often its guesses are right.

    python -m bench.speculation --backend jax   -> bench/results/speculation-cpu.json, docs/generate.md

The model is a preset with random weights; the draft is its first layer with the same embedding, and the model's other layers add `--off`
times what random ones would, so that the two agree more or less often, as trained pairs do. Texts are drawn at temperature 1. A model
without a draft and one with take turns, `--repeats` times, as other work may go on: wall time is the best of each, CPU time the median.
"""

import argparse
import itertools
import statistics
import sys
import time

from bench.rows import ROOT, Results, default_output
from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.inference.engine import Engine
from smedjan_common.inference.request import Request
from smedjan_common.inference.sampling import Sampling
from smedjan_common.inference.speculation import Speculator
from smedjan_common.model.params import initial_params, parameter_table
from smedjan_common.tokenizer import Tokenizer
from smedjan_mlx import openblas

HELD, PROMPT = 256, 16  # tokens


def main() -> None:
    """Measure what is missing in the result file."""
    args = _arguments()
    if args.backend == "mlx":
        openblas.preload(sys.argv[1:])
    output = ROOT / args.output if args.output else default_output("speculation")
    results = Results(output, ("backend", "size", "rows", "ahead", "off"), tokens=args.tokens, repeats=args.repeats)
    for size, off, rows, ahead in itertools.product(args.size, args.off, args.rows, args.ahead):
        case = {"backend": args.backend, "size": size, "rows": rows, "ahead": ahead, "off": off}
        if not results.has(case):
            results.add(case | _measured(args, size, rows, ahead, off))


def _measured(args: argparse.Namespace, preset: str, rows: int, ahead: int, off: float) -> dict[str, float | int]:
    tokenizer = _tokenizer(args.vocab_size)
    sizes = {"vocab_size": tokenizer.vocab_size, "context_length": HELD}
    model = ModelConfig.preset(preset, **sizes)
    small = ModelConfig.preset(preset, **sizes, layers=1)
    params = initial_params(model, 0)
    for name in params:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            params[name] *= model.layers**0.5 * (1 if name.startswith("layers.0.") else off)
    backend = _backend(args.backend)
    train = TrainConfig(steps=1, batch_size=1, seq_len=HELD, lr=1e-3)
    decoders = [
        backend(config, train).decoder({name: params[name] for name in parameter_table(config)}, HELD, rows)
        for config in (model, model, small)
    ]
    size = tokenizer.vocab_size
    engines = [
        Engine(decoders[0], tokenizer, reuse=False),
        Engine(decoders[1], tokenizer, reuse=False, speculator=Speculator(decoders[2], ahead, size, size, tokenizer.eot_id)),
    ]
    for engine in engines:
        _seconds(engine, rows, 2 * ahead + 8)  # compiles
        engine.stats.drafted_tokens = engine.stats.accepted_tokens = 0
    times = [[_seconds(engine, rows, args.tokens) for engine in engines] for _ in range(args.repeats)]
    (alone, alone_cpu), (drafted, drafted_cpu) = [
        (min(wall for wall, _ in its), statistics.median(cpu for _, cpu in its)) for its in zip(*times, strict=True)
    ]
    stats, drawn = engines[1].stats, rows * args.tokens
    return {
        "parameters": model.num_params(),
        "draft_parameters": small.num_params(),
        "right": round(stats.accepted_tokens / max(stats.drafted_tokens, 1), 3),
        "tokens_per_second_alone": round(drawn / alone, 1),
        "tokens_per_second": round(drawn / drafted, 1),
        "cpu_ms_alone": round(alone_cpu / drawn * 1e3, 2),
        "cpu_ms": round(drafted_cpu / drawn * 1e3, 2),
    }


def _seconds(engine: Engine, rows: int, tokens: int) -> tuple[float, float]:
    """Wall and CPU seconds of `rows` texts of so many tokens."""
    asked = [Request(tuple(range(row, row + PROMPT)), tokens, Sampling(seed=row), ignore_eot=True) for row in range(rows)]
    began = time.perf_counter(), time.process_time()
    for _ in engine.run(asked):
        pass
    return time.perf_counter() - began[0], time.process_time() - began[1]


def _tokenizer(vocab_size: int) -> Tokenizer:
    return Tokenizer.train_from_texts([path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))], vocab_size)


def _backend(name: str):
    if name == "jax":
        from smedjan_jax.backend import JaxBackend

        return JaxBackend
    from smedjan_mlx.backend import MlxBackend

    return MlxBackend


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("jax", "mlx"), required=True)
    parser.add_argument("--size", nargs="+", default=["medium", "large"])
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--ahead", type=int, nargs="+", default=[4])
    parser.add_argument("--off", type=float, nargs="+", default=[0.1, 0.3, 1.0])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", default="")
    return parser.parse_args()


if __name__ == "__main__":
    main()
