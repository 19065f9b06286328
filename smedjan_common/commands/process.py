"""`smedjan process`: clean text by named rules, with counts and a log of where it comes from."""

import dataclasses
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from smedjan_common import errors
from smedjan_common.command_line import NAMELESS, parse


@dataclass(frozen=True)
class Flags:
    """Normalise text and leave out documents and lines by named rules of the field; says what each rule dropped."""

    input: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH ..."), NAMELESS]
    """Text files, .jsonl, .json, .parquet, compressed ones, datasets (hf:NAME), directories, globs in quotes, s3:// or https://."""
    output: Annotated[str, tyro.conf.arg(metavar="FILE")]
    """The .jsonl file to write; records keep all their fields and gain "source"."""
    rules: Annotated[str, tyro.conf.arg(metavar="NAME,…", help_behavior_hint="")] = ""
    """Presets (gopher, gopher-quality, gopher-repetition, c4) and single rules; -NAME removes one. Made for English prose."""
    normalise: Annotated[str, tyro.conf.arg(metavar="NAME,…", help_behavior_hint="")] = ""
    """nfc, newlines (CRLF to LF), control (drop control characters), trailing (drop white space at line ends)."""
    separator: Annotated[str, tyro.conf.arg(help_behavior_hint="")] = ""
    """What separates documents in text files, \\n for a newline; by default a file is one document."""
    url: Annotated[str | None, tyro.conf.arg(help_behavior_hint="")] = None
    """Where the texts come from, for records that do not say."""
    licence: Annotated[str | None, tyro.conf.arg(help_behavior_hint="")] = None
    """Their licence, for records that do not say."""
    log: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """A .jsonl file with a line per document: source, url, licence, kept or the rule that dropped it."""
    report: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Write counts and samples as JSON."""
    list_rules: bool = False
    """Print every rule and preset, then end."""
    field: str = "text"
    """The field or column that holds the text."""
    errors: Literal["strict", "replace"] = "strict"
    """Bytes that are not UTF-8: refuse the file, or replace them by U+FFFD."""
    workers: Annotated[int | None, tyro.conf.arg(help_behavior_hint="")] = None
    """Number of processes; all cores by default."""
    executor: Literal["local", "ray"] = "local"
    """Where they are: on this machine, or on those of a Ray cluster (RAY_ADDRESS, else the one that `ray start` began here)."""
    force: bool = False
    """Replace outputs that exist."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit code."""
    if "--list-rules" in (sys.argv[1:] if argv is None else argv):  # needs no input and output
        return errors.run_command(_list_rules)
    flags = parse(
        Flags,
        "smedjan process",
        argv,
        "smedjan process texts/ --rules gopher --output clean.jsonl",
        "smedjan process my.txt --normalise nfc,newlines --output clean.jsonl --report process.json",
    )
    return errors.run_command(lambda: _run(flags))


def _list_rules() -> int:
    from smedjan_common.text.filters import LINE_RULES, PRESETS, RULES

    for name, rule in RULES.items():
        print(f"{name:<38}{rule.about}")
    for name, (_, about) in LINE_RULES.items():
        print(f"{name:<38}{about} (others are left out)")
    for name, members in PRESETS.items():
        print(f"{name:<38}= {', '.join(members)}")
    return 0


def _run(flags: Flags) -> int:
    from smedjan_common.commands.outputs import check_outputs
    from smedjan_common.files.atomic_file import write_atomically
    from smedjan_common.files.json_bytes import json_bytes
    from smedjan_common.reporting.console import counted
    from smedjan_common.reporting.progress import progress_bar
    from smedjan_common.text.process import process
    from smedjan_common.text.records import Reading

    check_outputs([flags.output, flags.log, flags.report], flags.force, flags.input)
    with progress_bar() as show:
        report = process(
            flags.input,
            flags.output,
            rules=[name for name in flags.rules.split(",") if name],
            normalise=[name for name in flags.normalise.split(",") if name],
            extra={name: value for name, value in (("url", flags.url), ("licence", flags.licence)) if value},
            reading=Reading(flags.field, flags.errors, flags.separator.replace("\\n", "\n")),
            log=flags.log,
            processes=flags.workers,
            executor=flags.executor,
            progress=show,
        )
    print(f"{flags.output}: {report.kept:,} of {report.documents:,} documents, {report.kept_bytes:,} of {report.bytes:,} bytes")
    for rule, count in sorted(report.dropped.items(), key=lambda item: -item[1]):
        sample = report.samples[rule][0]
        print(f"  {rule}: {counted(count, 'document')}, such as {sample['source']} ({sample['value']:g}): {sample['text'][:50]!r}")
    for rule, count in report.dropped_lines.items():
        print(f"  {rule}: {counted(count, 'line')}")
    if flags.report:
        write_atomically(flags.report, json_bytes(dataclasses.asdict(report), indent=1) + b"\n")
    return 0
