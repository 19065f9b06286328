"""What one core does of each part of making data, in MB of text per CPU second.

    python -m bench.data_rates [--megabytes 24]      -> bench/results/data_rates-cpu.json, for docs/scale.md

Text: source and documentation of the interpreter and the installed packages, as JSON lines. What workers do and what the one process does
that reads, orders and writes are timed apart: the first is divided by the number of cores, the second is not. CPU seconds, so that other
programs on the machine count little.
"""

import argparse
import gzip
import io
import json
import platform
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from bench.rows import RESULTS
from smedjan_common.data.prepare import BY_HASH, Piece, Tokenise
from smedjan_common.text.blocks import blocks, bundles
from smedjan_common.text.dedup import BANDS, ROWS, Sign, repeats
from smedjan_common.text.process import Clean
from smedjan_common.text.records import Reading, write_record
from smedjan_common.text.sources import find
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.tokenizer.words import WordCounter, add

ROUNDS = 3
ALIKE = 1 << 18  # signatures that are grouped


def main() -> None:
    """Measure, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--megabytes", type=int, default=24)
    megabytes = parser.parse_args().megabytes
    with tempfile.TemporaryDirectory() as name:
        report = rates(Path(name), megabytes << 20)
    path = RESULTS / "data_rates-cpu.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["rates"], indent=1))


def rates(folder: Path, size: int) -> dict[str, Any]:
    """All rows of the result file."""
    file = folder / "a.jsonl"
    documents, text = corpus(file, size)
    packed = folder / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(file.read_bytes(), 6))
    reading = Reading("text", "strict", "")
    found, chunks = find([str(file)]), list(bundles(reading.blocks(find([str(file)]))))
    pieces = [[Piece(block, BY_HASH) for block in bundle] for bundle in bundles(blocks(found))]
    tokenizer = Tokenizer.train([str(file)], vocab_size=32_768)
    tokenizer.save(folder / "tokenizer.json")
    fresh = [Tokenizer.load(folder / "tokenizer.json") for _ in range(ROUNDS)]  # one that has seen the words is twice as fast
    counted = [each(WordCounter(tokenizer.pattern), [bundle]).finish() for bundle in chunks]
    signatures = np.random.default_rng(1).integers(0, 1 << 32, (ALIKE, BANDS * ROWS), np.uint32)
    exact = np.random.default_rng(2).integers(0, 1 << 62, (ALIKE, 2), np.uint64)
    rows = [row for bundle in chunks for row in Clean(reading, [], [], {})(bundle)[1]]
    workers: dict[str, Callable[[], object]] = {
        "tokenizer: words counted": lambda: each(WordCounter(tokenizer.pattern), chunks),
        "process: gopher, nfc": lambda: each(Clean(reading, ["gopher"], ["nfc"], {}), chunks),
        "process: c4": lambda: each(Clean(reading, ["c4"], [], {}), chunks),
        "dedup: exact": lambda: each(Sign(reading, False), chunks),
        "dedup: MinHash": lambda: each(Sign(reading, True), chunks),
        "prepare: 32,768 ids": lambda: each(Tokenise(fresh.pop(), "text", "strict", 0.01), pieces),
    }
    one = {
        "JSON lines read": lambda: list(bundles(blocks(found))),
        "JSON lines read, gzip": lambda: list(bundles(blocks(find([str(packed)])))),
        "JSON lines written": lambda: [write_record(io.BytesIO(), record) for record, _, _ in rows],
        "counted words added up, of each MiB": lambda: add(counted),
    }
    return {
        "machine": cpu(),
        "python": platform.python_version(),
        "documents": documents,
        "text_bytes": text,
        "rates": {
            "worker": {name: round(text / 1e6 / cpu_seconds(work), 2) for name, work in workers.items()},
            "one": {name: round(text / 1e6 / cpu_seconds(work), 1) for name, work in one.items()},
            "documents_grouped": round(ALIKE / cpu_seconds(lambda: repeats(exact, signatures, 0.8))),
        },
    }


def cpu() -> str:
    """The model of the core."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def corpus(file: Path, size: int) -> tuple[int, int]:
    """Write JSON lines; (documents, bytes of text)."""
    documents = total = 0
    with open(file, "w") as out:
        for path in sorted(paths()):
            text = path.read_text("utf-8", "ignore")
            if not text or total >= size:
                continue
            out.write(json.dumps({"text": text[:60_000]}) + "\n")
            documents, total = documents + 1, total + len(text[:60_000].encode())
    return documents, total


def paths() -> Iterable[Path]:
    for place in {sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")}:
        for suffix in ("py", "md", "rst", "txt"):
            yield from Path(place).rglob(f"*.{suffix}")


def each(work: Any, items: Iterable[Any]) -> Any:
    """The worker, after all items."""
    for item in items:
        work(item)
    return work


def cpu_seconds(work: Callable[[], object]) -> float:
    """The least of a few rounds."""
    spent = []
    for _ in range(ROUNDS):
        started = time.process_time()
        work()
        spent.append(time.process_time() - started)
    return min(spent)


if __name__ == "__main__":
    main()
