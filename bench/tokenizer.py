"""Tokenizers side by side: training and encoding, ours and the peers that are installed, on one corpus, each case in its own process.

    python bench/tokenizer.py                     every case, best of 3 rounds -> bench/results/tokenizer.json, table in docs/tokenizer.md
    python bench/tokenizer.py --case train/smedjan-2 --folder DIR     one case, once, as JSON (what the rounds call)

The corpus: documentation and source texts of the installed packages and the interpreter, sorted, up to --megabytes; its fingerprint is
in the results. Peers (pip install tokenizers tiktoken rustbpe sentencepiece) that are missing are listed as such. All train cl100k's
plain pattern to 32,000 ids and all encode with the vocabulary that ours learnt; every encoder must give the same number of tokens.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
VOCAB = 32_000
RESULT, PAGE = ROOT / "bench" / "results" / "tokenizer.json", ROOT / "docs" / "tokenizer.md"
MARK = ("<!-- bench: tokenizer -->", "<!-- end -->")
PEERS = ("tokenizers", "tiktoken", "rustbpe", "sentencepiece")


def texts_of(folder: str) -> list[str]:
    return [path.read_bytes().decode() for path in sorted(Path(folder, "texts").iterdir())]  # as it is, CRLF too


def pattern() -> str:
    from smedjan_common.tokenizer.patterns import PATTERNS

    return PATTERNS["cl100k"]


def timed(work: Callable[[], object]) -> dict:
    started, cpu = time.perf_counter(), cpu_seconds()
    result = work()
    out = {"seconds": time.perf_counter() - started, "cpu_seconds": cpu_seconds() - cpu}
    return out | (result if isinstance(result, dict) else {})


def cpu_seconds() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def train_smedjan(folder: str, workers: int) -> dict:
    from smedjan_common.tokenizer import Tokenizer

    out = timed(lambda: {"tokenizer": Tokenizer.train([folder + "/texts"], VOCAB, special_tokens=(), workers=workers)})
    tokenizer = out.pop("tokenizer")
    if not Path(folder, "tokenizer.json").exists():
        tokenizer.save(Path(folder, "tokenizer.json"))
    return out | {"workers": workers}


def train_tokenizers(folder: str, threads: int) -> dict:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern()), "isolated"), byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, initial_alphabet=alphabet, min_frequency=2, show_progress=False)
    return timed(lambda: tokenizer.train_from_iterator(texts_of(folder), trainer))


def train_rustbpe(folder: str, threads: int) -> dict:
    import rustbpe

    return timed(lambda: rustbpe.Tokenizer().train_from_iterator(iter(texts_of(folder)), VOCAB, pattern=pattern()))


def train_sentencepiece(folder: str, threads: int) -> dict:
    import io

    import sentencepiece

    def work() -> None:
        lines = (line for text in texts_of(folder) for line in text.splitlines() if line)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=io.BytesIO(), model_type="bpe", vocab_size=VOCAB, num_threads=threads, minloglevel=2
        )

    return timed(work)


def encode_smedjan(folder: str, workers: int) -> dict:
    from smedjan_common.tokenizer import Tokenizer
    from smedjan_common.tokenizer.batch import encode_in_processes

    tokenizer, texts = Tokenizer.load(folder), texts_of(folder)
    cold = timed(lambda: {"tokens": len(encode_in_processes(tokenizer, texts, workers)[0])})
    if workers > 1:
        return cold
    warm = timed(lambda: encode_in_processes(tokenizer, texts, 1))
    return cold | {"warm_seconds": warm["seconds"], "warm_cpu_seconds": warm["cpu_seconds"]}


def encode_tiktoken(folder: str, threads: int) -> dict:
    import tiktoken

    from smedjan_common.tokenizer import Tokenizer

    ranks, texts = Tokenizer.load(folder).vocabulary.tokens, texts_of(folder)
    encoding = tiktoken.Encoding("bench", pat_str=pattern(), mergeable_ranks=ranks, special_tokens={})
    if threads == 1:
        return timed(lambda: {"tokens": sum(len(encoding.encode_ordinary(text)) for text in texts)})
    return timed(lambda: {"tokens": sum(map(len, encoding.encode_ordinary_batch(texts, num_threads=threads)))})


def encode_tokenizers(folder: str, threads: int) -> dict:
    from tokenizers import Tokenizer

    tokenizer, texts = Tokenizer.from_file(folder + "/tokenizer.json"), texts_of(folder)
    return timed(lambda: {"tokens": sum(len(one.ids) for one in tokenizer.encode_batch_fast(texts))})


CASES: dict[str, tuple[Callable[[str, int], dict], int]] = {
    f"{kind}/{name}-{threads}": (function, threads)
    for kind, name, function in (
        ("train", "smedjan", train_smedjan),
        ("train", "tokenizers", train_tokenizers),
        ("train", "rustbpe", train_rustbpe),
        ("train", "sentencepiece", train_sentencepiece),
        ("encode", "smedjan", encode_smedjan),
        ("encode", "tiktoken", encode_tiktoken),
        ("encode", "tokenizers", encode_tokenizers),
    )
    for threads in (1, 2)
}


def run_case(name: str, folder: str) -> dict:
    """The case in this process: its times, and the peak memory of this process and its workers in MiB."""
    function, threads = CASES[name]
    out = function(folder, threads)
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (threads if out.pop("workers", 1) > 1 else 0)
    return out | {"peak_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + children) / 1024}


def spawn(name: str, folder: str) -> dict | None:
    threads = str(CASES[name][1])
    environment = os.environ | {"RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true" if threads != "1" else "false"}
    command = [sys.executable, __file__, "--case", name, "--folder", folder]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        print(f"  {name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def make_corpus(folder: Path, size: int) -> dict:
    """Copy texts into `folder`/texts until `size` bytes; {documents, bytes, sha256}."""
    roots = [Path(sysconfig.get_paths()[name]) for name in ("purelib", "stdlib")]
    suffixes = (".md", ".rst", ".txt", ".py")
    found = sorted((suffixes.index(path.suffix), str(path)) for root in roots for path in root.rglob("*") if path.suffix in suffixes)
    (folder / "texts").mkdir()
    share, used, digest, documents = {suffix: size // 4 for suffix in range(4)}, 0, hashlib.sha256(), 0
    share[3] = size
    for kind, name in dict.fromkeys(found):
        data = Path(name).read_bytes() if os.path.getsize(name) > 500 else b""
        if not data or b"\0" in data or len(data) > share[kind] or used + len(data) > size or not is_plain(data):
            continue
        (folder / "texts" / f"{documents:05}.txt").write_bytes(data)
        digest.update(data)
        share[kind], used, documents = share[kind] - len(data), used + len(data), documents + 1
    return {"documents": documents, "bytes": used, "sha256": digest.hexdigest()}


def is_plain(data: bytes) -> bool:
    """Whether it is UTF-8 of assigned characters: about others the tools' Unicode versions differ, and so do their words."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return False
    return text.isascii() or all(unicodedata.category(character) != "Cn" for character in set(text))


def table(results: dict) -> str:
    """The results as Markdown."""
    size = results["corpus"]["bytes"]
    lines = ["| training, 32,000 ids | seconds | CPU seconds | peak MiB |", "|---|---|---|---|"]
    encode = ["| encoding | MB/s | MB per CPU second |", "|---|---|---|"]
    for name, row in results["cases"].items():
        kind, label = name.split("/")
        label = label.replace("-", ", ") + (" process" if "smedjan" in label else " thread") + ("es" if label == "smedjan-2" else "")
        label += "s" if label.endswith("2 thread") else ""
        if row is None:
            (lines if kind == "train" else encode).append(f"| {label} | not installed |" + " |" * (2 if kind == "train" else 1))
        elif kind == "train":
            lines.append(f"| {label} | {row['seconds']:.2f} | {row['cpu_seconds']:.2f} | {row['peak_mib']:.0f} |")
        else:
            encode.append(f"| {label} | {size / row['seconds'] / 1e6:.1f} | {size / row['cpu_seconds'] / 1e6:.1f} |")
            if "warm_seconds" in row:
                encode.append(
                    f"| {label}, words seen before | {size / row['warm_seconds'] / 1e6:.1f} | {size / row['warm_cpu_seconds'] / 1e6:.1f} |"
                )
    facts = f"{size / 1e6:.1f} MB in {results['corpus']['documents']} documents, {results['machine']}, best of {results['rounds']} rounds."
    return "\n".join([facts, "", *lines, "", *encode])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--folder")
    parser.add_argument("--megabytes", type=float, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--no-write", action="store_true", help="print, leave results and page as they are")
    flags = parser.parse_args()
    if flags.case:
        print(json.dumps(run_case(flags.case, flags.folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(Path(folder), int(flags.megabytes * 1e6))
        print(f"{corpus['bytes'] / 1e6:.1f} MB in {corpus['documents']} documents", file=sys.stderr)
        spawn("train/smedjan-2", folder)  # warms the files and leaves the tokenizer
        cases: dict[str, dict | None] = {}
        for number in range(flags.rounds):  # the cases take turns, so that a busy moment hits all of them
            for name in [name for name in CASES if flags.only in name]:
                row = spawn(name, folder) if number == 0 or cases[name] else None
                best = cases.get(name)
                if row and best:
                    row = {key: value if key in ("tokens", "peak_mib") else min(value, best[key]) for key, value in row.items()}
                cases[name] = row
                print(f"  {name}: {row}", file=sys.stderr)
    assert len({row["tokens"] for row in cases.values() if row and "tokens" in row}) <= 1, "the encoders do not agree"
    results = {
        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": {name: importlib.metadata.version(name) for name in PEERS if is_installed(name)},
        "rounds": flags.rounds,
        "corpus": corpus,
        "cases": cases,
    }
    print(table(results))
    if not flags.no_write:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(results, indent=1) + "\n")
        page = PAGE.read_text() if PAGE.exists() else "\n".join(MARK)
        before, after = page.split(MARK[0])[0], page.split(MARK[1])[1]
        PAGE.write_text(f"{before}{MARK[0]}\n{table(results)}\n{MARK[1]}{after}")


def is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
