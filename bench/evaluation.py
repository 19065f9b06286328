"""What it costs to score: tokens per second of documents in windows, and of questions, alone and in batches.

    python -m bench.evaluation          -> bench/results/evaluation-cpu.json

A model of `--size` with random weights. Documents: 4 of 1,500 tokens, context 512. Questions: 16 of 100 to 400 tokens with four answers,
of one token each (which share a row) or of six. The first pass, which compiles, is not counted. batch_tokens 1 is a row at a time.
"""

import argparse
import sys
import time
from collections.abc import Callable

import numpy as np

from bench.rows import RESULTS, Results
from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.inference.scoring import Scorer
from smedjan_common.model.params import initial_params
from smedjan_mlx import openblas

CONTEXT, VOCABULARY = 512, 8192
BATCHES = (1, 1024, 4096)


def main() -> None:
    """Measure what is missing in the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny")
    size = parser.parse_args().size
    openblas.preload(sys.argv[1:])
    results = Results(RESULTS / "evaluation-cpu.json", ("size", "backend", "work", "batch_tokens"), context=CONTEXT, vocabulary=VOCABULARY)
    model = ModelConfig.preset(size, vocab_size=VOCABULARY, context_length=CONTEXT)
    for backend in ("jax", "mlx"):
        side = _backend(backend, model)
        params = side.place(initial_params(model, 0))
        for tokens in BATCHES:
            scorer = Scorer(side, params, CONTEXT, tokens)
            for work, (read, run) in _works().items():
                row = {"size": size, "backend": backend, "work": work, "batch_tokens": tokens}
                if not results.has(row):
                    results.add(row | _measured(scorer, read, run))


def _backend(name: str, model: ModelConfig):
    train = TrainConfig(steps=1, batch_size=1, seq_len=CONTEXT, lr=1.0)
    if name == "jax":
        from smedjan_jax.backend import JaxBackend

        return JaxBackend(model, train)
    from smedjan_mlx.backend import MlxBackend

    return MlxBackend(model, train)


def _works() -> dict[str, tuple[int, Callable[[Scorer], object]]]:
    """name -> (tokens that are scored or read, what is called)."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, VOCABULARY, 1500) for _ in range(4)]
    contexts = [rng.integers(0, VOCABULARY, length).tolist() for length in rng.integers(100, 400, 16)]

    def questions(length: int) -> list[tuple[list[int], list[int]]]:
        return [(context, rng.integers(0, VOCABULARY, length).tolist()) for context in contexts for _ in range(4)]

    short, long = questions(1), questions(6)
    return {
        "documents": (sum(map(len, documents)), lambda scorer: scorer.documents(documents)),
        "documents, stride 256": (sum(map(len, documents)), lambda scorer: scorer.documents(documents, CONTEXT // 2)),
        "answers of one token": (sum(len(one) + len(two) for one, two in short), lambda scorer: scorer.continuations(short)),
        "answers of six tokens": (sum(len(one) + len(two) for one, two in long), lambda scorer: scorer.continuations(long)),
    }


def _measured(scorer: Scorer, read: int, run: Callable[[Scorer], object]) -> dict[str, float]:
    """Tokens per second and per second of processor, the better of two passes."""
    run(scorer)
    found = []
    for _ in range(2):
        began, processor = time.perf_counter(), time.process_time()
        run(scorer)
        found.append((time.perf_counter() - began, time.process_time() - processor))
    return {
        "tokens_per_second": round(read / min(wall for wall, _ in found)),
        "tokens_per_cpu_second": round(read / min(cpu for _, cpu in found)),
    }


if __name__ == "__main__":
    main()
