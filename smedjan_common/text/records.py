"""Documents with what is known about them, for the commands that clean text: JSONL in, JSONL out, every field kept.

A text file becomes {"text", "source"}; records of JSONL keep their fields (source, url, licence, …) and gain "source" where they lack
it, so that where a text comes from is never lost. Text files are read whole, up to 1 GiB.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from smedjan_common.files.atomic_file import atomic_file
from smedjan_common.text.blocks import Block, blocks
from smedjan_common.text.cuts import mend_surrogates
from smedjan_common.text.documents import documents, objects
from smedjan_common.text.sources import Source

_WHOLE = 1 << 30
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Reading:
    """How documents are read: the `field` of the text, `errors` for bytes that are not UTF-8, `separator` that cuts text files."""

    field: str = "text"
    errors: str = "strict"
    separator: str = ""

    def blocks(self, found: Iterable[Source]) -> Iterator[Block]:
        """Blocks that cut no document."""
        return blocks(found, size=_CHUNK, field=self.field, whole=_WHOLE)

    def records(self, block: Block) -> Iterator[dict[str, Any]]:
        """The documents of a block with all their fields; empty ones as well."""
        if block.kind in ("jsonl", "array"):
            for number, record in objects(block, self.field, self.errors):
                yield {"source": f"{block.path}:{number}"} | record
            return
        for number, text in enumerate(documents(block, self.field, self.errors)):
            place = block.path if block.kind == "text" else f"{block.path}:{block.offset + number}"
            for part in text.split(self.separator) if self.separator else [text]:
                yield {"source": place, self.field: part}

    def texts(self, block: Block) -> Iterator[str]:
        """The texts of a block's documents, in the order of `records`."""
        return (record[self.field] for record in self.records(block))


def write_records(path: str | Path, records: Iterable[dict[str, Any]]) -> int:
    """Write records as JSONL, atomically; how many."""
    count = 0
    with atomic_file(path) as file:
        for record in records:
            write_record(file, record)
            count += 1
    return count


def write_record(file: BinaryIO, record: dict[str, Any]) -> None:
    """One line."""
    line = json.dumps(record, ensure_ascii=False)
    try:
        data = line.encode()
    except UnicodeEncodeError:
        data = mend_surrogates(line).encode()
    file.write(data + b"\n")
