"""`smedjan dedup`: documents without their repeats."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from smedjan_common import errors
from smedjan_common.command_line import NAMELESS, parse


@dataclass(frozen=True)
class Flags:
    """Leave out documents that repeat an earlier one, exactly or nearly (MinHash over runs of five words), and say which."""

    input: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH ..."), NAMELESS]
    """Text files, .jsonl, .json, .parquet, compressed ones, datasets (hf:NAME), directories, globs in quotes, s3:// or https://."""
    output: Annotated[str, tyro.conf.arg(metavar="FILE")]
    """The .jsonl file to write; records keep all their fields."""
    threshold: float = 0.8
    """The least similarity (Jaccard, estimated from 112 hashes) of a near repeat."""
    exact_only: bool = False
    """Leave out exact repeats only."""
    separator: Annotated[str, tyro.conf.arg(help_behavior_hint="")] = ""
    """What separates documents in text files, \\n for a newline; by default a file is one document."""
    report: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Write counts and samples of what was dropped as JSON."""
    field: str = "text"
    """The field or column that holds the text."""
    errors: Literal["strict", "replace"] = "strict"
    """Bytes that are not UTF-8: refuse the file, or replace them by U+FFFD."""
    workers: Annotated[int | None, tyro.conf.arg(help_behavior_hint="")] = None
    """Number of processes; all cores by default."""
    executor: Literal["local", "ray"] = "local"
    """Where they are: on this machine, or on those of a Ray cluster (RAY_ADDRESS, else the one that `ray start` began here)."""
    force: bool = False
    """Replace --output and --report if they exist."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit code."""
    flags = parse(
        Flags,
        "smedjan dedup",
        argv,
        "smedjan dedup texts/ --output clean.jsonl",
        "smedjan dedup crawl.jsonl --output clean.jsonl --threshold 0.7 --report dedup.json",
    )
    return errors.run_command(lambda: _run(flags))


def _run(flags: Flags) -> int:
    from smedjan_common.commands.outputs import check_outputs
    from smedjan_common.files.atomic_file import write_atomically
    from smedjan_common.files.json_bytes import json_bytes
    from smedjan_common.reporting.progress import progress_bar
    from smedjan_common.text.dedup import dedup
    from smedjan_common.text.records import Reading

    check_outputs([flags.output, flags.report], flags.force, flags.input)
    reading = Reading(flags.field, flags.errors, flags.separator.replace("\\n", "\n"))
    threshold = None if flags.exact_only else flags.threshold
    with progress_bar() as show:
        report = dedup(
            flags.input, flags.output, threshold=threshold, reading=reading, processes=flags.workers, executor=flags.executor, progress=show
        )
    print(
        f"{flags.output}: {report.kept:,} of {report.documents:,} documents; dropped {report.exact:,} exact, {report.near:,} near repeats"
    )
    for kind, samples in report.samples.items():
        for sample in samples[:2]:
            print(f"  {kind}: {sample['dropped']} repeats {sample['kept']}: {sample['text'][:60]!r}")
    if flags.report:
        write_atomically(flags.report, json_bytes(dataclasses.asdict(report), indent=1) + b"\n")
    return 0
