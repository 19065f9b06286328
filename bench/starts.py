"""What the compilation cache saves: a command's first start, with an empty cache, and its second.

    python -m bench.starts                                              -> bench/results/starts-DEVICE.json, docs/performance.md
    python -m bench.starts --size xxl --mixer attention --batch-size 8 --seq-len 2048 --dtype bfloat16          (on a GPU)

The command trains two steps of `--size` and `--mixer` on this repository's documentation, `--repeats` times over with a cache of its own.
On a CPU its seconds of CPU are taken, so other work on the machine moves them by some tens of percent and not by times. On a GPU it is
the time until the first step is said to be done, and of it what the step takes, compiling included; the run is killed then.
"""

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.rows import ROOT, Results, Row, default_output
from smedjan_common.data.prepare import prepare
from smedjan_common.tokenizer import Tokenizer


def main() -> None:
    """Measure what is missing in the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--mixer", nargs="+", default=["attention", "rwkv"])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--dtype", default="auto")
    flags = parser.parse_args()
    results = Results(default_output("starts"), ("size", "mixer"), repeats=flags.repeats)
    start = _cpu_seconds if results.about["device"] == "cpu" else _seconds_to_first_step
    shape = f"--size {flags.size} --batch-size {flags.batch_size} --seq-len {flags.seq_len} --dtype {flags.dtype}".split()
    with tempfile.TemporaryDirectory() as folder:
        data = _data(Path(folder))
        for mixer in flags.mixer:
            case = {"size": flags.size, "mixer": mixer}
            if not results.has(case):
                pairs = [
                    _pair(start, Path(folder) / f"{mixer}-{number}", data, [*shape, "--mixer", mixer]) for number in range(flags.repeats)
                ]
                first, second = (min(its, key=lambda row: max(row.values())) for its in zip(*pairs, strict=True))
                results.add(case | _named("first", first) | _named("second", second))


def _data(folder: Path) -> Path:
    texts = sorted((ROOT / "docs").glob("*.md"))
    tokenizer = Tokenizer.train(texts, 1024)
    prepare(texts, folder / "train.bin", tokenizer)
    tokenizer.save(folder / "tokenizer.json")
    return folder / "train.bin"


def _named(which: str, row: Row) -> Row:
    return {f"{which}_{name}": value for name, value in row.items()}


def _pair(start: Callable[..., Row], folder: Path, data: Path, words: list[str]) -> tuple[Row, Row]:
    """Two starts that share a cache which was empty before."""
    return start(folder / "1", folder / "cache", data, words), start(folder / "2", folder / "cache", data, words)


def _cpu_seconds(run: Path, cache: Path, data: Path, words: list[str]) -> Row:
    command, environment = _command(run, cache, data, words)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1)}


def _seconds_to_first_step(run: Path, cache: Path, data: Path, words: list[str]) -> Row:
    command, environment = _command(run, cache, data, [*words, "--log-every", "1"])
    started, taken = time.perf_counter(), None
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout
        said = []
        for line in process.stdout:
            said.append(line)
            if found := re.match(r"compiled, with the first step, in ([\d.]+)s", line):
                taken = {"seconds": round(time.perf_counter() - started, 1), "step_seconds": float(found[1])}
                break
        process.kill()
    if taken is None:
        raise RuntimeError("".join(said[-10:]))
    return taken


def _command(run: Path, cache: Path, data: Path, words: list[str]) -> tuple[list[str], dict[str, str]]:
    two_steps = "--steps 2 --warmup 0 --sample-every 0 --checkpoint-every 0".split()
    command = [sys.executable, "-m", "smedjan_jax.train", "--dataset", str(data), "--checkpoint-dir", str(run), *two_steps, *words]
    return command, {**os.environ, "XDG_CACHE_HOME": str(cache)}


if __name__ == "__main__":
    main()
