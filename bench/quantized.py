"""What quantising costs and saves: loss on held-out text, size, and the time of a token, of a run and its two quantised forms.

    smedjan quickstart && python -m bench.quantized runs/quickstart   -> bench/results/quantized-cpu.json, docs/convert.md
    python -m bench.quantized runs/trained-pair/target --data runs/trained-pair/val.bin --size large      after bench.trained_pair, on a GPU

The loss is that of the run's own validation tokens, the first `--tokens` of them. A run of a few minutes is small: what a token costs is
measured on a model of `--size` with random weights too. Milliseconds: the best of `--repeats` greedy texts of one row, over its tokens,
with the engine that `smedjan generate` has: on a GPU it draws in blocks without the host.
"""

import argparse
import importlib
import importlib.util
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from bench.rows import Results, default_output
from convert.cli import main as convert
from smedjan_common.backend import Snapshot
from smedjan_common.checkpoint import About, SavedTokenizer, newest, write_final
from smedjan_common.commands import quickstart
from smedjan_common.config import ModelConfig
from smedjan_common.data.token_file import TokenFile
from smedjan_common.inference.opened import Load, OpenModel
from smedjan_common.inference.request import Request
from smedjan_common.inference.sampling import Sampling
from smedjan_common.model.params import initial_params
from smedjan_common.tokenizer import Tokenizer
from smedjan_mlx import openblas

FORMS = ("float32", "8", "4")
PROMPT, WRITTEN = 8, 64  # tokens


def main() -> None:
    """Measure what is missing in the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, help="its validation tokens (default: those that smedjan quickstart made)")
    parser.add_argument("--size", default="medium")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="auto", help="to compute in; auto: bfloat16 on a GPU, float32 on a CPU")
    flags = parser.parse_args()
    openblas.preload(sys.argv[1:])
    settings = {"tokens": flags.tokens, "repeats": flags.repeats, "dtype": flags.dtype}
    results = Results(default_output("quantized"), ("model", "backend", "form"), **settings)
    backends = [name for name, package in (("jax", "jax"), ("mlx", "mlx")) if importlib.util.find_spec(package)]
    tokens = np.asarray(TokenFile.open(flags.data or quickstart.data_folder(flags.run) / "val.bin").tokens[: flags.tokens])
    with tempfile.TemporaryDirectory() as folder:
        models = {"trained": flags.run, flags.size: _random(flags.size, flags.run, Path(folder) / "random")}
        for name, run in models.items():
            for form in FORMS:
                path = _converted(run, form, Path(folder) / f"{name}-{form}")
                for backend in backends:
                    row = {"model": name, "backend": backend, "form": form}
                    if not results.has(row):
                        results.add(row | _measured(path, backend, tokens if name == "trained" else None, flags))


def _random(size: str, run: Path, folder: Path) -> Path:
    """A model of a preset with the tokenizer of the run, never trained."""
    tokenizer = Tokenizer.load(newest(run).path)
    model = ModelConfig.preset(size, vocab_size=tokenizer.vocab_size, context_length=256)
    about = About(model=model, tokenizer=SavedTokenizer.of(tokenizer), framework={"name": "bench"})
    write_final(folder, Snapshot(0, initial_params(model, 0), {}), about)
    return folder


def _converted(run: Path, form: str, folder: Path) -> Path:
    if form == "float32":
        return run
    assert convert([str(run), str(folder), "--to", "quantized", "--bits", form]) == 0
    return folder


def _measured(path: Path, backend: str, tokens: np.ndarray | None, flags: argparse.Namespace) -> dict[str, float | int | str]:
    """Bytes of the weights, milliseconds of a token, and of `tokens` the loss in nats and the seconds that it took."""
    opened = OpenModel(path)
    opened.use(backend, _load(backend), flags.dtype)
    engine, times = opened.engine(1, PROMPT, WRITTEN), []
    for _ in range(1 + flags.repeats):
        began = time.perf_counter()
        for _ in engine.run([Request(tuple(range(1, 1 + PROMPT)), WRITTEN, Sampling(temperature=0.0), ignore_eot=True)]):
            pass
        times.append(time.perf_counter() - began)
    found: dict[str, float | int | str] = {
        "dtype": opened.dtype,
        "parameters": opened.model.num_params(),
        "bytes": sum(tensor.nbytes for tensor in opened.info.weights.values()),
        "token_ms": round(min(times[1:]) / WRITTEN * 1e3, 3),  # the first compiles
    }
    if tokens is not None:
        opened.scorer.documents([tokens[:2000]])  # compiles
        began = time.perf_counter()
        logprobs = opened.scorer.documents([tokens])[0]
        found |= {"seconds": round(time.perf_counter() - began, 2), "loss": round(-float(logprobs.mean(dtype=np.float64)), 5)}
    return found


def _load(name: str) -> Load:
    def load():
        module = importlib.import_module(f"smedjan_{name}.backend")
        return getattr(module, {"jax": "JaxBackend", "mlx": "MlxBackend"}[name]), module.default_dtype()

    return load


if __name__ == "__main__":
    main()
