"""Cleaning text: normalise, leave out lines and documents by named rules, and keep a log of where every text comes from.

Workers clean blocks in processes; the results come back in order, so the output is the same for any number of them,
on one machine or several.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from smedjan_common.errors import DataError, near
from smedjan_common.executors import start
from smedjan_common.files.atomic_file import atomic_file
from smedjan_common.text.blocks import Block, bundles
from smedjan_common.text.filters import choose, filter_lines, first_broken
from smedjan_common.text.records import Reading, write_record
from smedjan_common.text.sources import find, much, total_size

SAMPLES = 3
_PROVENANCE = ("source", "url", "licence", "license")

NORMALISATIONS: dict[str, Callable[[str], str]] = {
    "nfc": lambda text: unicodedata.normalize("NFC", text),
    "newlines": lambda text: text.replace("\r\n", "\n").replace("\r", "\n"),
    "control": lambda text: "".join(c for c in text if c in "\n\t\r" or unicodedata.category(c) != "Cc"),
    "trailing": lambda text: "\n".join(line.rstrip() for line in text.split("\n")),
}


@dataclass
class ProcessReport:
    """What came in, what stays, what each rule dropped (documents, and lines for line rules), with samples."""

    documents: int = 0
    kept: int = 0
    bytes: int = 0
    kept_bytes: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    dropped_lines: dict[str, int] = field(default_factory=dict)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


class Clean:
    """What runs in each process: blocks -> (size, [(record, why it is dropped or None, its figure)], lines taken by rule, bytes)."""

    def __init__(self, reading: Reading, rules: list[str], normalise: list[str], extra: dict[str, str]):
        self._reading, self._normalise, self._extra = reading, normalise, extra
        self._rules, self._line_rules = choose(rules)

    def __call__(self, blocks: list[Block]) -> tuple[int, list[tuple[dict[str, Any], str | None, float]], Counter, int]:
        rows, lines, size = [], Counter(), 0
        for record in (record for block in blocks for record in self._reading.records(block)):
            text = record[self._reading.field]
            size += len(text.encode("utf-8", "replace"))
            for name in self._normalise:
                text = NORMALISATIONS[name](text)
            text, taken = filter_lines(text, self._line_rules)
            lines.update(taken)
            broken = ("empty", 0.0) if not text.strip() else first_broken(text, self._rules)
            rows.append((self._extra | record | {self._reading.field: text}, *(broken or (None, 0.0))))
        return sum(len(block.data) for block in blocks), rows, lines, size


def process(
    inputs: Iterable[str],
    output: str,
    *,
    rules: list[str] | None = None,
    normalise: list[str] | None = None,
    extra: dict[str, str] | None = None,
    reading: Reading | None = None,
    log: str | None = None,
    processes: int | None = None,
    executor: str = "local",
    progress: Callable[[str, int, int], None] | None = None,
) -> ProcessReport:
    """Write the documents that hold all rules to `output` (JSONL). `extra`: fields, such as url and licence, for records without them.

    `log`: a JSONL file with a line per document: its provenance, whether it stays, else the rule and the figure that dropped it.
    Empty documents are always left out. Raises DataError, OSError; nothing half-written is left.
    """
    choose(rules or [])
    for name in normalise or []:
        if name not in NORMALISATIONS:
            raise DataError(f"There is no normalisation {name!r}.", near(name, NORMALISATIONS), "Name some of these after --normalise.")
    reading, report = reading or Reading(), ProcessReport()
    found = find(inputs, field=reading.field)
    total, done = total_size(found), 0
    lines: Counter = Counter()
    with ExitStack() as stack:
        out = stack.enter_context(atomic_file(output))
        log_file = stack.enter_context(atomic_file(log)) if log else None
        arguments = (reading, rules or [], normalise or [], extra or {})
        pool = stack.enter_context(start(executor, "smedjan_common.text.process:Clean", arguments, processes, much(found)))
        for size, rows, taken, text_bytes in pool.map(bundles(reading.blocks(found))):
            lines.update(taken)
            report.bytes += text_bytes
            for record, rule, value in rows:
                _count(report, record, rule, value, reading.field)
                if rule is None:
                    write_record(out, record)
                if log_file:
                    write_record(log_file, _provenance(record, rule, value))
            done += size
            if progress:
                progress("clean", min(done, total), total)
    report.dropped_lines = dict(lines)
    return report


def _count(report: ProcessReport, record: dict[str, Any], rule: str | None, value: float, name: str) -> None:
    report.documents += 1
    if rule is None:
        report.kept += 1
        report.kept_bytes += len(record[name].encode("utf-8", "replace"))
        return
    report.dropped[rule] = report.dropped.get(rule, 0) + 1
    samples = report.samples.setdefault(rule, [])
    if len(samples) < SAMPLES:
        samples.append({"source": record["source"], "value": round(value, 4), "text": record[name][:120]})


def _provenance(record: dict[str, Any], rule: str | None, value: float) -> dict[str, Any]:
    entry: dict[str, Any] = {name: record[name] for name in _PROVENANCE if name in record} | {"kept": rule is None}
    return entry if rule is None else entry | {"rule": rule, "value": round(value, 6)}
