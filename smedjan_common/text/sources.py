"""Inputs as streams of blocks: text files, JSONL, Parquet, Hugging Face datasets; compressed or not, directories and globs.

A text file is one document; a line of JSONL, a row of Parquet or of a dataset is one (its field `text` by default). Files are
read in blocks of a few megabytes, so that nothing is ever wholly in memory; a long text is cut only at a safe cut (patterns.py).
The blocks are raw bytes: decoding and parsing is the workers' part (`documents`).
"""

import bz2
import contextlib
import glob
import gzip
import io
import json
import lzma
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from smedjan_common.errors import DataError
from smedjan_common.nearby import beside
from smedjan_common.text.cuts import last_safe_cut

BLOCK_BYTES = 4 << 20
BUNDLE_BYTES = 1 << 20
_LONGEST_WITHOUT_CUT = 64 << 20  # a text without any safe cut is cut anywhere between characters at this size
_WINDOW = 1 << 16
_BOM = b"\xef\xbb\xbf"
DATASET_PREFIX = "hf:"
# what to do, for the commands with --input; run/data.py says it anew for `train`, which has other flags
NAME_FIELD = "Name the field or column that holds the text with --field."
REPLACE_BYTES = "Convert the file, or replace such bytes by U+FFFD with --errors replace."
_KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}  # other names are text
_ROWS = 1024


def _open_zstd(path: Path) -> BinaryIO:
    try:
        from compression import zstd  # Python 3.14  # pyright: ignore[reportMissingImports]

        return zstd.open(path, "rb")  # type: ignore[return-value]
    except ImportError:
        pass
    try:
        import zstandard
    except ImportError:
        raise DataError(
            f"Cannot read {str(path)!r}.", "Zstandard files need the package zstandard.", "Run: pip install zstandard."
        ) from None
    return zstandard.open(path, "rb")  # type: ignore[return-value]


_OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd}
COMPRESSED = tuple(_OPENERS)


@dataclass(frozen=True)
class Source:
    """One input. `kind`: a key of READERS; `size`: bytes on disk, 0 where that is not known."""

    path: Path
    kind: str
    size: int

    def open(self) -> BinaryIO:
        """Its content, decompressed."""
        return _OPENERS.get(self.path.suffix.lower(), lambda path: open(path, "rb", buffering=0))(self.path)


@dataclass(frozen=True)
class Block:
    """A piece of a source. `offset`: of its first byte in the (decompressed) source; `line`: number of its first line.

    `kind`: "text", "jsonl", or "rows" (texts whose UTF-8 stands one after another in `data`, `lengths` bytes each). Of a text:
    `starts`, whether it begins here; `ends`, whether it ends here.
    """

    path: str
    kind: str
    offset: int
    line: int
    data: bytes
    starts: bool = True
    ends: bool = True
    lengths: tuple[int, ...] = ()

    def count(self) -> int:
        """How many documents are in it, a cut text counting as one."""
        if self.kind == "jsonl":
            return sum(1 for line in self.data.split(b"\n") if line.strip())
        return len(self.lengths) if self.kind == "rows" else 1


def find(inputs: Iterable[str | os.PathLike], flag: str = "--input") -> list[Source]:
    """The files that `inputs` (files, directories, globs, hf:NAME[:CONFIG[:SPLIT]] for datasets) name, sorted, each once.

    Raises DataError, which names the `flag` of the inputs, for what is not there. A directory gives all its files, hidden and binary
    ones left out.
    """
    found: dict[str, Source] = {}
    for given in inputs:
        name = os.fspath(given)
        if name.startswith(DATASET_PREFIX):
            found[name] = Source(Path(name), "dataset", 0)
            continue
        path = Path(name)
        if path.is_dir():
            files = _files_below(path)
        elif path.exists():
            files = [path]
        else:
            files = [Path(match) for match in sorted(glob.glob(name, recursive=True)) if Path(match).is_file()]
        if not files:
            what = f"There is no text in {name!r}." if path.exists() else f"There is no input {name!r}."
            why = "" if path.exists() or glob.has_magic(name) else beside(path)
            raise DataError(what, why, f"Check the path; {flag} takes files, directories and quoted globs.")
        for file in files:
            found.setdefault(os.path.abspath(file), Source(file, kind_of(file), file.stat().st_size))
    if not found:
        raise DataError("No input was given.", "", f"Give {flag} with one or more files, directories or globs.")
    return sorted(found.values(), key=lambda source: str(source.path))


def kind_of(path: Path) -> str:
    """How the file is read, from its name without the suffix of compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _OPENERS:
        suffixes.pop()
    return _KINDS.get(suffixes[-1], "text") if suffixes else "text"


def blocks(sources: Iterable[Source], known_pattern: bool = True, size: int = BLOCK_BYTES, field: str = "text") -> Iterator[Block]:
    """All sources as blocks in order. Raises DataError, OSError."""
    for source in sources:
        try:
            yield from READERS[source.kind](source, size if known_pattern else _LONGEST_WITHOUT_CUT, field)
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError) as error:
            raise DataError(
                f"Cannot decompress {str(source.path)!r}.", f"{error}.", "The file is damaged or cut short; get it again."
            ) from None


def bundles(
    items: Iterable[Any], size: int = BUNDLE_BYTES, of: Callable[[Any], int] = lambda block: len(block.data)
) -> Iterator[list[Any]]:
    """Items in lists of at least `size` bytes, so that many small files cost few messages."""
    bundle, total = [], 0
    for item in items:
        bundle.append(item)
        total += of(item)
        if total >= size:
            yield bundle
            bundle, total = [], 0
    if bundle:
        yield bundle


def _text_blocks(source: Source, size: int, field: str) -> Iterator[Block]:
    offset, starts, rest = 0, True, b""
    at_once = size if source.path.suffix.lower() in _OPENERS else min(size, source.size + 1)  # a buffer is made for all that is asked for
    with source.open() as file:
        while True:
            fresh = _read(file, at_once)
            data = rest + fresh
            if offset == 0 and starts and data.startswith(_BOM):
                data, offset = data[len(_BOM) :], len(_BOM)
            if not fresh:
                if data or starts:
                    yield Block(str(source.path), "text", offset, 1, data, starts, True)
                return
            cut = _cut(data) if len(data) >= size else 0
            if cut:
                yield Block(str(source.path), "text", offset, 1, data[:cut], starts, False)
                starts = False
            rest, offset = data[cut:], offset + cut


def _jsonl_blocks(source: Source, size: int, field: str) -> Iterator[Block]:
    offset, line, rest = 0, 1, b""
    with source.open() as file:
        while True:
            fresh = _read(file, size)
            data = rest + fresh
            if offset == 0 and line == 1 and data.startswith(_BOM):
                data, offset = data[len(_BOM) :], len(_BOM)
            cut = data.rfind(b"\n") + 1 if fresh else len(data)
            if cut:
                yield Block(str(source.path), "jsonl", offset, line, data[:cut])
                line += data.count(b"\n", 0, cut)
            if not fresh:
                return
            rest, offset = data[cut:], offset + cut


def _parquet_blocks(source: Source, size: int, field: str) -> Iterator[Block]:
    with _pyarrow_errors(source):
        from pyarrow import parquet

        with parquet.ParquetFile(source.path) as file:
            names = file.schema_arrow.names
            if field not in names:
                why = f"It has {', '.join(map(repr, names[:8]))}."
                raise DataError(f"{str(source.path)!r} has no column {field!r}.", why, NAME_FIELD)
            rows = (text for batch in file.iter_batches(_ROWS, columns=[field]) for text in batch.column(0).to_pylist())
            yield from _row_blocks(str(source.path), rows, size, field)


def _dataset_blocks(source: Source, size: int, field: str) -> Iterator[Block]:
    name = str(source.path)
    path, config, split = ([*name.removeprefix(DATASET_PREFIX).split(":"), "", ""])[:3]
    try:
        import datasets
    except ImportError:
        raise DataError(f"Cannot read {name!r}.", "It needs the package datasets.", "Run: pip install datasets.") from None
    try:
        if (Path(path) / "state.json").is_file():
            rows = datasets.load_from_disk(path)
        else:
            rows = datasets.load_dataset(path, config or None, split=split or "train", streaming=True)
    except (OSError, ValueError) as error:
        fix = f"Check the name, {DATASET_PREFIX}NAME[:CONFIG[:SPLIT]], and that it is on this machine or that the hub is reached."
        raise DataError(f"Cannot load the dataset {name!r}.", f"{str(error).splitlines()[0]}.", fix) from None
    yield from _row_blocks(name, (_row_text(name, number, row, field) for number, row in enumerate(rows)), size, field)


def _row_text(name: str, number: int, row: dict, field: str) -> str | None:
    if field not in row:
        why = f"It has {', '.join(map(repr, list(row)[:8]))}."
        raise DataError(f"Row {number} of {name!r} has no field {field!r}.", why, NAME_FIELD)
    return row[field]


def _row_blocks(name: str, rows: Iterable[Any], size: int, field: str) -> Iterator[Block]:
    """Texts in blocks of about `size` bytes; null is an empty text."""
    texts, total, first = [], 0, 0
    for number, text in enumerate(rows):
        if not isinstance(text, str | None):
            why = f"It is a {type(text).__name__}."
            raise DataError(f"The field {field!r} in row {number} of {name!r} is no text.", why, NAME_FIELD)
        texts.append((text or "").encode("utf-8", "replace"))
        total += len(texts[-1])
        if total >= size:
            yield Block(name, "rows", first, first, b"".join(texts), lengths=tuple(map(len, texts)))
            texts, total, first = [], 0, number + 1
    if texts:
        yield Block(name, "rows", first, first, b"".join(texts), lengths=tuple(map(len, texts)))


@contextlib.contextmanager
def _pyarrow_errors(source: Source) -> Iterator[None]:
    name = str(source.path)
    try:
        import pyarrow
    except ImportError:
        raise DataError(f"Cannot read {name!r}.", "Parquet needs the package pyarrow.", "Run: pip install pyarrow.") from None
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"Cannot read {name!r}.", f"{str(error).splitlines()[0]}.", "The file is damaged or no Parquet; get it again."
        ) from None


# kind -> blocks of a source, given the size of a block and the field that holds the text
READERS: dict[str, Callable[[Source, int, str], Iterator[Block]]] = {
    "text": _text_blocks,
    "jsonl": _jsonl_blocks,
    "parquet": _parquet_blocks,
    "dataset": _dataset_blocks,
}


def _read(file: BinaryIO, size: int) -> bytes:
    """Up to `size` bytes, fewer only at the end."""
    parts = []
    while size > 0 and (part := file.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _cut(data: bytes) -> int:
    """Where to end a block: a safe cut near the end; 0 when there is none yet and the text may go on growing."""
    for window in (_WINDOW, len(data)):
        start = _character_start(data, max(0, len(data) - window))
        end = _character_start(data, len(data) - 4)
        text = data[start:end].decode("utf-8", "surrogateescape")
        if (cut := last_safe_cut(text)) is not None:
            return start + len(text[:cut].encode("utf-8", "surrogateescape"))
    return _character_start(data, len(data) - 4) if len(data) >= _LONGEST_WITHOUT_CUT else 0


def _character_start(data: bytes, at: int) -> int:
    """`at`, moved back to the start of its UTF-8 character."""
    for back in range(4):
        if at - back <= 0:
            return 0
        if data[at - back] & 0xC0 != 0x80:
            return at - back
    return at


def documents(block: Block, field: str = "text", errors: str = "strict") -> Iterator[str]:
    """The texts of a block: one for text, one per line for JSONL (empty ones skipped), one per row. Raises DataError with the place."""
    if block.kind == "text":
        yield decode(block, 0, block.data, errors)
        return
    at = 0
    if block.kind == "rows":
        for length in block.lengths:
            yield block.data[at : at + length].decode()
            at += length
        return
    for number, line in enumerate(io.BytesIO(block.data)):
        if line.strip():
            text = decode(block, at, line, errors)
            yield json_object(block, block.line + number, text, field)[field]
        at += len(line)


def decode(block: Block, at: int, data: bytes, errors: str) -> str:
    """UTF-8 bytes of a block as text."""
    try:
        return data.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{block.path!r} is not UTF-8.",
            f"Byte {block.offset + at + error.start} (0x{data[error.start]:02x}) is not part of any character.",
            REPLACE_BYTES,
        ) from None


def json_object(block: Block, line: int, text: str, field: str) -> dict[str, Any]:
    """A line of JSONL as an object with a text in `field`. Raises DataError with file and line."""
    where = f"Line {line} of {block.path!r}"
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        why = f"{error}." if isinstance(error, ValueError) else "It is nested too deeply."
        raise DataError(f"{where} is not JSON.", why, "Each line of a .jsonl file is one JSON object; mend or remove the line.") from None
    value = record.get(field) if isinstance(record, dict) else None
    if not isinstance(value, str):
        has = (
            f"It has {', '.join(map(repr, list(record)[:8])) or 'no fields'}."
            if isinstance(record, dict)
            else f"It is a {type(record).__name__}."
        )
        raise DataError(f"{where} has no text in the field {field!r}.", has, NAME_FIELD)
    return record


def _files_below(folder: Path) -> list[Path]:
    """All files of a folder in order, without hidden ones and those with a NUL byte at the beginning, unless compressed."""
    files = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(place, name) for name in names if not name.startswith(".") and _is_wanted(os.path.join(place, name))]
    return sorted(files)


def _is_wanted(file: str) -> bool:
    if not os.path.isfile(file):
        return False
    if os.path.splitext(file)[1].lower() in (*_OPENERS, ".parquet"):
        return True
    with open(file, "rb", buffering=0) as handle:
        return b"\0" not in handle.read(4096)
