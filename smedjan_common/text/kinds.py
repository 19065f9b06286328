"""How an input is read: by its name where the name says so, else by its first bytes; what is no text is refused with what to do.

JSON comes as lines, as an array, or as objects one after another; names such as .json or part-00000 do not say which.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

from smedjan_common.errors import DataError
from smedjan_common.remote.address import Address
from smedjan_common.text.compressed import COMPRESSED, named, open_raw

NAME_FIELD = "Name the field or column that holds the text with --field."
HEAD_BYTES = 1 << 16
_TOKENS = ".bin"  # with its manifest beside it; a large vocabulary's may look like UTF-8
_BOM = b"\xef\xbb\xbf"
UTF16 = (b"\xff\xfe", b"\xfe\xff")
_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_PLAIN = {".txt", ".text", ".md", ".rst", ".tex"}  # text whatever it begins with
_UNPACK = "Unpack it, and give the files in it."
_EXPORT = "Save the text in it as .txt or .jsonl first."
_TABLE = "Write its column of text as .jsonl or .parquet first."
_PAGES = "Take the text out of it first, or give it a name that ends in .txt to train on it as it is."
_REFUSED: dict[str, tuple[str, str]] = {  # suffix -> what it is, what to do
    **dict.fromkeys((".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar"), ("an archive", _UNPACK)),
    **dict.fromkeys((".csv", ".tsv"), ("a table", _TABLE)),
    **dict.fromkeys((".xlsx", ".xls", ".ods", ".arrow", ".feather", ".avro", ".orc"), ("a table", _TABLE)),
    **dict.fromkeys((".html", ".htm", ".xhtml"), ("a web page", _PAGES)),
    ".ipynb": ("a notebook", _PAGES),
    **dict.fromkeys((".pdf", ".docx", ".doc", ".odt", ".epub", ".rtf"), ("a document of another program", _EXPORT)),
}
_OBJECT = re.compile(rb'\s*\{\s*"[^"\\]*+(?:\\.[^"\\]*+)*+"\s*:')
_ARRAY = re.compile(rb'\s*\[\s*\{\s*"')


class Kind(NamedTuple):
    """`name`: a key of READERS. `why_not`: (what it is, what to do) of an input that is no text to read, None of one that is."""

    name: str
    why_not: tuple[str, str] | None = None


def kind_of(path: Path | Address, field: str) -> Kind:
    """How a file is read, from its name without the suffix of compression, else from its first bytes. Raises OSError, DataError."""
    suffix = suffix_of(path)
    if suffix == _TOKENS and _has_manifest(path):
        return Kind("text", ("a token file already", "Train on it: smedjan train FILE.bin; or give the text that it was made of."))
    if suffix in _REFUSED:
        return Kind("text", _REFUSED[suffix])
    if suffix in _KINDS or suffix in _PLAIN:
        return Kind(_KINDS.get(suffix, "text"))
    with named(path), open_raw(path) as file:
        head = file.read(HEAD_BYTES)
    return kind_of_head(head, suffix, field)


def _has_manifest(path: Path | Address) -> bool:
    if isinstance(path, Address):
        from smedjan_common.remote.store import Place

        return Place(Address(f"{path.url}.json")).stat_if_there() is not None
    return Path(f"{path}.json").is_file()


def suffix_of(path: Path | Address) -> str:
    """The last suffix, in lower case, without that of compression; .jsonl of "a.jsonl.gz"."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def kind_of_head(head: bytes, suffix: str, field: str) -> Kind:
    """The same from the first bytes of the content."""
    head = head.removeprefix(_BOM)
    line, *more = head.lstrip().split(b"\n", 1)
    if _OBJECT.match(line) and (_is_object(line) or (not more and len(head) >= HEAD_BYTES)):
        return Kind("jsonl", _lacks(line, field))
    if _ARRAY.match(head) or (suffix == ".json" and line.startswith((b"[", b"{"))):
        return Kind("array", _lacks(head, field))
    if suffix == ".json" and line:
        return Kind("array", ("neither JSON lines nor an array of objects", _PAGES))
    return Kind("text")


def refuse(path: Path | Address, why_not: tuple[str, str]) -> DataError:
    """The error for an input that is no text to read."""
    what, fix = why_not
    return DataError(f"{str(path)!r} is not text to train on.", f"It is {what}.", fix, case="field" if fix.startswith(NAME_FIELD) else "")


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _lacks(record: bytes, field: str) -> tuple[str, str] | None:
    """Why the beginning of JSON has no records with the field, None where it has them or one cannot know; "" is any field."""
    if not field:
        return None
    key = re.compile(re.escape(json.dumps(field).encode()) + rb"\s*:")
    if key.search(record) or len(record) >= HEAD_BYTES or b"{" not in record:
        return None
    return f"JSON without the field {field!r}", f"{NAME_FIELD} To take the file as it is, give it a name that ends in .txt."
