"""The texts in a block: what workers decode and parse, with the place of whatever is wrong."""

import io
import json
from collections.abc import Iterator
from typing import Any

from smedjan_common.errors import DataError
from smedjan_common.text.blocks import Block
from smedjan_common.text.kinds import NAME_FIELD, UTF16

REPLACE_BYTES = "Convert the file, or replace such bytes by U+FFFD with --errors replace."
_UTF16 = "It is UTF-16: convert it (iconv -f UTF-16 -t UTF-8)."


def documents(block: Block, field: str = "text", errors: str = "strict") -> Iterator[str]:
    """The texts of a block: one for text, one per line or object of JSON (blank lines skipped), one per row; null is an empty text.

    Raises DataError with the place.
    """
    if block.kind == "text":
        yield decode(block, 0, block.data, errors)
    elif block.kind == "rows":
        yield from _rows(block, errors)
    else:
        for _, record in objects(block, field, errors):
            yield record[field]


def objects(block: Block, field: str | None, errors: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line or number of the object, object) of a block of JSON, with a text in `field`; None: whatever it has."""
    at = 0
    for number, line in enumerate(io.BytesIO(block.data), block.line):
        if line.strip():
            yield number, _object(block, number, decode(block, at, line, errors, number), field)
        at += len(line)


def decode(block: Block, at: int, data: bytes, errors: str, number: int = 0) -> str:
    """UTF-8 bytes of a block as text. `at`: where they begin in it; `number`: of the row or object they are."""
    try:
        return data.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        if block.kind in ("text", "jsonl"):
            where, what = block.path, f"Byte {block.offset + at + error.start} (0x{data[error.start]:02x})"
            fix = _UTF16 if block.offset + at + error.start == 0 and data.startswith(UTF16) else REPLACE_BYTES
            raise DataError(f"{where!r} is not UTF-8.", f"{what} is not part of any character.", fix, case="bytes") from None
        what = f"{_NAMES[block.kind]} {number} of {block.path!r} is not UTF-8."
        why = f"Byte {error.start} of it (0x{data[error.start]:02x}) is not part of any character."
        raise DataError(what, why, REPLACE_BYTES, case="bytes") from None


_NAMES = {"jsonl": "Line", "array": "Object", "rows": "Row"}  # lines and objects are counted from 1, rows from 0


def _rows(block: Block, errors: str) -> Iterator[str]:
    at = 0
    for number, length in enumerate(block.lengths, block.offset):
        end = at + max(length, 0)
        yield decode(block, at, block.data[at:end], errors, number)
        at = end


def _object(block: Block, number: int, text: str, field: str | None) -> dict[str, Any]:
    """A line of JSON as an object with a text in `field`; null becomes an empty text. None: as any object."""
    where = f"{_NAMES[block.kind]} {number} of {block.path!r}"
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        why = f"{error}." if isinstance(error, ValueError) else "It is nested too deeply."
        each = (
            "Each line of a .jsonl file is one JSON object; correct or remove the line."
            if block.kind == "jsonl"
            else "Correct or remove it."
        )
        raise DataError(f"{where} is not JSON.", why, each) from None
    if not isinstance(record, dict):
        kinds = {list: "an array", str: "a text", bool: "true or false", type(None): "null"}
        why = f"It is {kinds.get(type(record), 'a number')}, not an object."
        if field is None:
            raise DataError(f"{where} is no row.", why, "Correct or remove it.")
    elif field is None:
        return record
    elif field not in record:
        why = f"It has {', '.join(map(repr, list(record)[:8])) or 'no fields'}."
    elif record[field] is None:
        return record | {field: ""}
    elif isinstance(record[field], str):
        return record
    else:
        why = f"It is {json.dumps(record[field])[:40]}, not text."
    raise DataError(f"{where} has no text in the field {field!r}.", why, NAME_FIELD, case="field")
