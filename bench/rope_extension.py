"""Context extension for real: a trained model at 1, 2 and 4 times its context, with RoPE scaling none, ntk and yarn.

    python -m bench.rope_extension      -> bench/results/rope_extension-DEVICE.json

Trains the preset on the default corpus at `seq_len`, then evaluates the same weights at longer sequences under each scaling with
factor 4, without further training; then trains on at 4 times the length with yarn for a tenth of the steps and evaluates again.
Every evaluation covers all held-out text, cut into sequences of the length. `by_position`: the loss of the targets in each eighth of
the sequence, from evaluation steps whose other targets do not count.
"""

import argparse
import dataclasses
import functools
import importlib
import json
import pathlib
import time

import numpy as np

from bench import corpus
from bench.rows import Results, Row, default_output, device_name, in_processes
from smedjan_common.backend import Backend, State
from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.data.order import eval_batches
from smedjan_common.model.params import initial_params
from smedjan_common.training.config import default_lr

SCALINGS = ("none", "ntk", "yarn")  # linear is ntk's forerunner, and llama3 is of weights that were trained with it
KEY = ("mixer", "seed", "weights", "rope_scaling", "seq_len")
FACTOR, PARTS = 4, 8
FORMS: dict[str, Row] = {
    "gpu": {"size": "small", "seq_len": 256, "batch_size": 32, "steps": 1500, "more_steps": 150, "max_batches": None},
    "cpu": {"size": "tiny", "seq_len": 128, "batch_size": 8, "steps": 400, "more_steps": 40, "max_batches": None},
    "test": {
        "size": "tiny",
        "seq_len": 8,
        "batch_size": 8,
        "steps": 2,
        "more_steps": 1,
        "max_batches": 1,
        "model": {"layers": 1, "dim": 32},
    },
}


def main() -> None:
    """Train and evaluate in one process, whose rows are kept as they come."""
    args = _arguments()
    if args.task:
        measure(json.loads(args.task))
        return
    form = FORMS[args.form or ("cpu" if device_name() == "cpu" else "gpu")]
    corpus.make(args.data)
    dataset = corpus.Corpus(args.data).train.hash[:16]
    results = Results(args.output or default_output("rope_extension"), KEY, **form, factor=FACTOR, dataset=dataset)
    tasks = [{**form, "backend": args.backend, "mixer": mixer, "seed": 0, "data": str(args.data)} for mixer in args.mixers]

    def done(task: Row, rows: list[Row]) -> None:
        for row in rows:
            if not results.has(row):
                results.add({name: value for name, value in row.items() if name != "data"})

    lengths = [form["seq_len"] * times for times in (1, 2, FACTOR)]
    complete = {mixer: sum(row["mixer"] == mixer for row in results.rows) == len(lengths) * (len(SCALINGS) + 1) for mixer in args.mixers}
    in_processes("bench.rope_extension", [task for task in tasks if not complete[task["mixer"]]], done, 1, args.limit_seconds)


def measure(task: Row) -> None:
    """Train, evaluate under every scaling, train on with yarn, evaluate; each row is printed when it is known."""
    data = corpus.Corpus(pathlib.Path(task["data"]))
    length, started = task["seq_len"], time.perf_counter()
    model = ModelConfig.preset(
        task["size"], vocab_size=data.tokenizer.vocab_size, context_length=length, mixer=(task["mixer"],), **task.get("model", {})
    )
    make_backend, dtype = _load(task["backend"])
    config = TrainConfig(
        task["steps"], task["batch_size"], length, default_lr(model.dim), seed=task["seed"], warmup=task["steps"] // 20, dtype=dtype
    )
    trained = make_backend(model, config)
    weights = trained.save(data.train_steps(trained, trained.init(initial_params(model, task["seed"])))).params
    lengths = [length * times for times in (1, 2, FACTOR)]
    compiled = functools.cache(lambda scaling, seq_len: make_backend(extended(model, scaling), at_length(config, seq_len)))

    def evaluate(name: str, params: Row, scaling: str) -> None:
        for seq_len in lengths:
            backend = compiled(scaling, seq_len)
            state = backend.init(params)
            row = {"mixer": task["mixer"], "backend": task["backend"], "seed": task["seed"], "weights": name, "rope_scaling": scaling}
            row |= {"seq_len": seq_len, "parameters": model.num_params(), **data.evaluate(backend, state, task["max_batches"])}
            row |= {
                "by_position": by_position(data, backend, state, task["max_batches"]),
                "seconds": round(time.perf_counter() - started, 1),
            }
            print(json.dumps(row), flush=True)

    for scaling in SCALINGS:
        evaluate("trained", weights, scaling)
    more = dataclasses.replace(
        at_length(config, length * FACTOR), steps=task["more_steps"], warmup=task["more_steps"] // 10, lr=config.lr / 3
    )
    longer = make_backend(extended(model, "yarn"), more)
    evaluate("trained on", longer.save(data.train_steps(longer, longer.init(weights))).params, "yarn")


def extended(model: ModelConfig, scaling: str) -> ModelConfig:
    """The model for FACTOR times its context."""
    scaled = {} if scaling == "none" else {"rope_factor": float(FACTOR), "rope_original_len": model.context_length}
    return dataclasses.replace(model, context_length=model.context_length * FACTOR, rope_scaling=scaling, **scaled)


def at_length(config: TrainConfig, seq_len: int) -> TrainConfig:
    """The same tokens per step in sequences of `seq_len`."""
    return dataclasses.replace(config, seq_len=seq_len, batch_size=max(1, config.batch_size * config.seq_len // seq_len))


def by_position(data: corpus.Corpus, backend: Backend, state: State, max_batches: int | None) -> list[float]:
    """Mean loss of the targets in each of PARTS equal parts of the sequence."""
    config, sums = backend.train, [[0.0, 0.0] for _ in range(PARTS)]
    for inputs, targets in eval_batches(data.val, config.seq_len, config.batch_size, max_batches):
        for part, total in enumerate(sums):
            masked, here = np.full_like(targets, -1), slice(part * config.seq_len // PARTS, (part + 1) * config.seq_len // PARTS)
            masked[:, here] = targets[:, here]
            read = backend.read(backend.eval_step(state, inputs, masked))
            total[0] += read["loss_sum"]
            total[1] += read["tokens"]
    return [round(loss / tokens, 4) for loss, tokens in sums]


def _load(backend: str):
    return importlib.import_module(f"smedjan_{backend}.train").load()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("jax", "mlx"), default="jax")
    parser.add_argument("--mixers", nargs="+", default=["attention"])
    parser.add_argument("--form", choices=FORMS, help="default: by the device")
    parser.add_argument("--data", type=pathlib.Path, default=corpus.FOLDER, help="folder of the token files, made there if need be")
    parser.add_argument("--limit-seconds", type=float, default=150)
    parser.add_argument("--output", type=pathlib.Path, help="default: bench/results/rope_extension-DEVICE.json")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
