"""What quantising costs and saves: loss on held-out text, size, and the time of a token, of a run and its two quantised forms.

    smedjan quickstart && python -m bench.quantized runs/quickstart   -> bench/results/quantized-cpu.json, docs/convert.md

The loss is that of the run's own validation tokens, the first `--tokens` of them. A run of a few minutes is small: what a token costs is
measured on a model of `--size` with random weights too. Milliseconds: the median of `--repeats` greedy steps of one row, after 8 others.
"""

import argparse
import statistics
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
from smedjan_common.model.params import initial_params
from smedjan_common.tokenizer import Tokenizer
from smedjan_mlx import openblas

FORMS = ("float32", "8", "4")


def main() -> None:
    """Measure what is missing in the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, help="its validation tokens (default: those that smedjan quickstart made)")
    parser.add_argument("--size", default="medium")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--repeats", type=int, default=40)
    flags = parser.parse_args()
    openblas.preload(sys.argv[1:])
    results = Results(default_output("quantized"), ("model", "backend", "form"), tokens=flags.tokens, repeats=flags.repeats)
    tokens = np.asarray(TokenFile.open(flags.data or quickstart.data_folder(flags.run) / "val.bin").tokens[: flags.tokens])
    with tempfile.TemporaryDirectory() as folder:
        models = {"trained": flags.run, flags.size: _random(flags.size, flags.run, Path(folder) / "random")}
        for name, run in models.items():
            for form in FORMS:
                path = _converted(run, form, Path(folder) / f"{name}-{form}")
                for backend in ("jax", "mlx"):
                    row = {"model": name, "backend": backend, "form": form}
                    if not results.has(row):
                        results.add(row | _measured(path, backend, tokens if name == "trained" else None, flags.repeats))


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


def _measured(path: Path, backend: str, tokens: np.ndarray | None, repeats: int) -> dict[str, float | int]:
    """Bytes of the weights, milliseconds of a token, and of `tokens` the loss in nats and the seconds that it took."""
    opened = OpenModel(path)
    opened.use(backend, _load(backend))
    found: dict[str, float | int] = {
        "parameters": opened.model.num_params(),
        "bytes": sum(tensor.nbytes for tensor in opened.info.weights.values()),
    }
    decoder, times = opened.backend.decoder(opened.params, 256, 1), []
    token = int(decoder.feed([1]).argmax())
    for _ in range(8 + repeats):
        began = time.perf_counter()
        logits = decoder.step(np.array([token], np.int32), np.array([True]))[0]
        times.append(time.perf_counter() - began)
        token = int(logits.argmax())
    found["token_ms"] = round(statistics.median(times[8:]) * 1e3, 2)
    if tokens is not None:
        opened.scorer.documents([tokens[:2000]])  # compiles
        began = time.perf_counter()
        logprobs = opened.scorer.documents([tokens])[0]
        found |= {"seconds": round(time.perf_counter() - began, 1), "loss": round(-float(logprobs.mean(dtype=np.float64)), 5)}
    return found


def _load(backend: str) -> Load:
    def load():
        if backend == "jax":
            from smedjan_jax.backend import JaxBackend

            return JaxBackend, "float32"
        from smedjan_mlx.backend import MlxBackend

        return MlxBackend, "float32"

    return load


if __name__ == "__main__":
    main()
