"""What the compilation cache saves: CPU seconds of a command's first start, with an empty cache, and of its second.

    python -m bench.starts            -> bench/results/starts-cpu.json, docs/performance.md

The command trains two steps of `--size` and `--mixer` on this repository's documentation, `--repeats` times over with a cache of its own.
CPU seconds are the process's own, so other work on the machine moves them by some tens of percent and not by times.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.rows import ROOT, Results, default_output
from smedjan_common.data.prepare import prepare
from smedjan_common.tokenizer import Tokenizer


def main() -> None:
    """Measure what is missing in the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--mixer", nargs="+", default=["attention", "rwkv"])
    parser.add_argument("--repeats", type=int, default=1)
    flags = parser.parse_args()
    results = Results(default_output("starts"), ("size", "mixer"), repeats=flags.repeats)
    with tempfile.TemporaryDirectory() as folder:
        data = _data(Path(folder))
        for mixer in flags.mixer:
            case = {"size": flags.size, "mixer": mixer}
            if not results.has(case):
                pairs = [_pair(Path(folder) / f"{mixer}-{number}", data, flags.size, mixer) for number in range(flags.repeats)]
                first, second = (min(its) for its in zip(*pairs, strict=True))
                results.add(case | {"first_cpu_seconds": round(first, 1), "second_cpu_seconds": round(second, 1)})


def _data(folder: Path) -> Path:
    texts = sorted((ROOT / "docs").glob("*.md"))
    tokenizer = Tokenizer.train(texts, 1024)
    prepare(texts, folder / "train.bin", tokenizer)
    tokenizer.save(folder / "tokenizer.json")
    return folder / "train.bin"


def _pair(folder: Path, data: Path, size: str, mixer: str) -> tuple[float, float]:
    """CPU seconds of two starts that share a cache which was empty before."""
    return _start(folder / "1", folder / "cache", data, size, mixer), _start(folder / "2", folder / "cache", data, size, mixer)


def _start(run: Path, cache: Path, data: Path, size: str, mixer: str) -> float:
    words = f"--size {size} --mixer {mixer} --steps 2 --warmup 0 --batch-size 8 --seq-len 128 --sample-every 0 --checkpoint-every 0".split()
    command = [sys.executable, "-m", "smedjan_jax.train", "--dataset", str(data), "--checkpoint-dir", str(run), *words]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=ROOT, env={**os.environ, "XDG_CACHE_HOME": str(cache)}, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
