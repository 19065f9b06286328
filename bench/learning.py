"""What each mixer learns: validation loss on the default corpus on equal tokens, and two synthetic tasks of recall.

    python -m bench.learning            every mixer and a 3:1 hybrid -> bench/results/learning-DEVICE.json

corpus: the preset tiny, everything else equal, several seeds; the loss over all held-out text.
associative, copying (bench/recall.py): 4 layers of width 64 with 2 heads of 32, so that a recurrent state is small against what is to
be remembered; accuracy over held-out sequences by the number of things to recall.

Each row is a process of its own; `--jobs` of them share the device, since none is timed.
"""

import argparse
import importlib
import json
import pathlib
import sys
from typing import Any

import numpy as np

from bench import corpus
from bench.recall import TASKS, VOCAB_SIZE, stage
from bench.rows import Results, Row, default_output, device_name, in_processes
from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.model.config import parse_pattern
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.params import initial_params
from smedjan_common.training.config import default_lr
from smedjan_common.training.schedule import learning_rate
from smedjan_mlx import openblas

KEY = ("task", "backend", "mixer", "seed")
HYBRIDS = ("ssm,ssm,ssm,attention", "gated-deltanet,gated-deltanet,gated-deltanet,attention")
FORMS: dict[str, Row] = {
    "gpu": {"corpus": {"steps": 1000, "batch_size": 16, "seq_len": 256}, "recall": {"steps": 2400, "batch_size": 64}, "seeds": [0, 1]},
    "cpu": {"corpus": {"steps": 500, "batch_size": 8, "seq_len": 128}, "recall": {"steps": 2400, "batch_size": 32}, "seeds": [0]},
    "test": {"corpus": {"steps": 2, "batch_size": 2, "seq_len": 16}, "recall": {"steps": 1, "batch_size": 2}, "seeds": [0]},
}
# heads and states of 32 and blocks of 8 everywhere: the tables' own defaults are made for wider models and longer sequences
RECALL_MODEL: Row = {"dim": 64, "layers": 4, "heads": 2, "ffn_dim": 128, "init_std": 0.1}
RECALL_OPTIONS: Row = {"ssm_state": 32, "ssm_head_dim": 32, "rwkv_head_dim": 32, "block_size": 8, "block_topk": 2}
RECALL_LENGTH, RECALL_COUNTS, RECALL_LR = 96, (4, 8, 16, 32), 1e-3
HELD_OUT = 512  # sequences per count


def main() -> None:
    """Train what is missing, a process per row."""
    args = _arguments()
    if args.backend == "mlx":
        openblas.preload(sys.argv[1:])
    if args.task:
        print(json.dumps(train(json.loads(args.task))), flush=True)
        return
    on_cpu = device_name() == "cpu"
    form = args.form or ("cpu" if on_cpu else "gpu")
    corpus.make(args.data)
    results = Results(
        args.output or default_output("learning" if args.backend == "jax" else f"learning-{args.backend}"),
        KEY,
        **FORMS[form],
        recall_model={**RECALL_MODEL, **RECALL_OPTIONS, "length": RECALL_LENGTH, "lr": RECALL_LR},
        dataset=corpus.Corpus(args.data).train.hash[:16],
    )
    patterns = args.mixers or [*MIXERS, *(hybrid for hybrid in HYBRIDS if set(parse_pattern(hybrid)) <= set(MIXERS))]
    rows = [
        {"task": task, "backend": args.backend, "mixer": mixer, "seed": seed}
        for seed in FORMS[form]["seeds"]
        for task in args.tasks
        for mixer in patterns
        if task == "corpus" or not seed
    ]
    tasks = [{**row, "form": form, "data": str(args.data)} for row in rows if not results.has(row)]
    jobs = args.jobs or (1 if on_cpu else 8)

    def done(task: Row, rows: list[Row]) -> None:
        for row in rows:
            results.add({name: value for name, value in row.items() if name not in ("form", "data")})

    in_processes("bench.learning", tasks, done, jobs, args.limit_seconds, {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"})


def train(task: Row) -> Row:
    """The finished row of one training."""
    return {**task, **(_corpus if task["task"] == "corpus" else _recall)(task)}


def _corpus(task: Row) -> Row:
    data = corpus.Corpus(pathlib.Path(task["data"]))
    shape = FORMS[task["form"]]["corpus"]
    mixer = parse_pattern(task["mixer"])
    model = ModelConfig.preset("tiny", vocab_size=data.tokenizer.vocab_size, context_length=shape["seq_len"], mixer=mixer)
    make_backend, dtype = _backend(task["backend"])
    config = TrainConfig(**shape, lr=default_lr(model.dim), warmup=shape["steps"] // 20, seed=task["seed"], dtype=dtype)
    backend = make_backend(model, config)
    state = data.train_steps(backend, backend.init(initial_params(model, task["seed"])))
    return {"parameters": model.num_params(), **data.evaluate(backend, state, 2 if task["form"] == "test" else None)}


def _recall(task: Row) -> Row:
    shape, make = FORMS[task["form"]]["recall"], TASKS[task["task"]]
    mixer = parse_pattern(task["mixer"])
    model = ModelConfig.build(vocab_size=VOCAB_SIZE, context_length=RECALL_LENGTH, mixer=mixer, **RECALL_MODEL, **RECALL_OPTIONS)
    config = TrainConfig(**shape, seq_len=RECALL_LENGTH, lr=RECALL_LR, weight_decay=0.0, warmup=shape["steps"] // 20, seed=task["seed"])
    backend = _backend(task["backend"])[0](model, config)
    state, rng = backend.init(initial_params(model, task["seed"])), np.random.default_rng(task["seed"])
    for step in range(config.steps):
        length, counts = stage(step / config.steps, RECALL_LENGTH, RECALL_COUNTS)
        batch = make(rng, rng.choice(counts, config.batch_size), length)
        state, metrics = backend.train_step(state, *batch, learning_rate(config, step))
        if step % 50 == 49:
            backend.read(metrics)
    held_out = np.random.default_rng(1_000_000 + task["seed"])
    accuracy = {}
    for count in RECALL_COUNTS:
        inputs, targets = make(held_out, np.full(HELD_OUT, count), RECALL_LENGTH)
        right = _predictions(backend, state, inputs) == targets
        accuracy[str(count)] = round(float(right[targets >= 0].mean()), 4)
    return {"parameters": model.num_params(), "loss": backend.read(metrics)["loss"], "accuracy": accuracy}


def _backend(name: str) -> tuple[Any, str]:
    """The backend's class, and the dtype that a run of it would have."""
    return importlib.import_module(f"smedjan_{name}.train").load()


def _predictions(backend: Any, state: Any, inputs: np.ndarray) -> np.ndarray:
    """The most likely next token at every position, [B, T]."""
    model_class = importlib.import_module(f"smedjan_{backend.name}.model").Model
    if backend.name == "jax":
        import jax

        logits = jax.jit(lambda params, tokens: model_class(backend.model, params)(tokens))(backend.params_of(state), inputs)
    else:
        import mlx.core as mx

        logits = model_class(backend.model, backend.params_of(state))(mx.array(inputs))
    return np.asarray(logits).argmax(axis=-1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("jax", "mlx"), default="jax")
    parser.add_argument("--mixers", nargs="+", metavar="PATTERN", help="default: every row of the table, and the hybrids")
    parser.add_argument("--tasks", nargs="+", choices=("corpus", *TASKS), default=["corpus", *TASKS])
    parser.add_argument("--form", choices=FORMS, help="default: by the device")
    parser.add_argument("--data", type=pathlib.Path, default=corpus.FOLDER, help="folder of the token files, made there if need be")
    parser.add_argument("--jobs", type=int, help="processes at a time; default: 8 on a GPU, 1 on a CPU")
    parser.add_argument("--limit-seconds", type=float, default=240)
    parser.add_argument("--output", type=pathlib.Path, help="default: bench/results/learning-DEVICE.json")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
