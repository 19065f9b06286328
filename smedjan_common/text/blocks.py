"""Inputs as streams of blocks: text files, JSON lines and arrays, Parquet, Hugging Face datasets; compressed or not.

A text file is one document; a line of JSONL, an object of an array, a row of Parquet or of a dataset is one (its field `text` by
default). Files are read in blocks of a few megabytes, so that nothing is ever wholly in memory; a long text is cut only at a safe cut
(cuts.py). The blocks are raw bytes: decoding and parsing is the workers' part (documents.py).
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from smedjan_common.errors import DataError
from smedjan_common.text import rows
from smedjan_common.text.compressed import COMPRESSED, named, open_raw
from smedjan_common.text.cuts import last_safe_cut
from smedjan_common.text.kinds import HEAD_BYTES, kind_of_head, refuse
from smedjan_common.text.sources import Source

BLOCK_BYTES = 4 << 20
BUNDLE_BYTES = 1 << 20
LONGEST = 64 << 20  # a text without any safe cut is cut anywhere between characters at this size; a longer line or object is refused
_WINDOW = 1 << 16
_AT_ONCE = 16 << 20  # bytes asked of a library, which may make room for all of them
_BOM = b"\xef\xbb\xbf"
_TOKENS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[{}]', re.DOTALL)  # of JSON: strings, the last one maybe cut, and what nests


@dataclass(frozen=True)
class Block:
    """A piece of a source. `offset`: of its first byte in the (decompressed) source, or number of its first row; `line`: number of its
    first line or object.

    `kind`: "text", "jsonl", "array" (objects of an array, a line each), or "rows" (texts whose UTF-8 stands one after another in
    `data`, `lengths` bytes each, -1 for null). Of a text: `starts`, whether it begins here; `ends`, whether it ends here.
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
        if self.kind in ("jsonl", "array"):
            return sum(1 for line in self.data.split(b"\n") if line.strip())
        return len(self.lengths) if self.kind == "rows" else 1


def blocks(
    sources: Iterable[Source], known_pattern: bool = True, size: int = BLOCK_BYTES, field: str = "text", whole: int = 0
) -> Iterator[Block]:
    """All sources as blocks in order. `whole`: texts of up to so many bytes are not cut. Raises DataError, OSError."""
    for source in sources:
        text_size = whole or (size if known_pattern else LONGEST)
        with named(source.path):
            if source.kind in ROWS:
                lots = ROWS[source.kind](source.place, field)
                yield from _row_blocks(str(source.path), lots, size)
                continue
            with _Stream(source) as stream:
                kind = stream.kind(field) if source.kind == "pipe" else source.kind
                yield from READERS[kind](stream, text_size if kind == "text" else size)


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


class _Stream:
    """The content of a source without its byte order mark. `offset`: of the next byte to read."""

    def __init__(self, source: Source):
        self.path, self.offset = str(source.path), 0
        is_known = source.size and source.path.suffix.lower() not in COMPRESSED
        self._most = source.size + 1 if is_known else _AT_ONCE  # bytes that are worth asking for
        self._source, self._head = source, b""

    def __enter__(self) -> "_Stream":
        self._file: BinaryIO = open_raw(self._source.path)
        self._head = self._read(len(_BOM))
        if self._head == _BOM:
            self._head, self.offset = b"", len(_BOM)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def kind(self, field: str) -> str:
        """What the first bytes say it is. Raises DataError for what is no text."""
        self._head += self._read(HEAD_BYTES)
        kind = kind_of_head(self._head, "", field)
        if kind.why_not:
            raise refuse(self._source.path, kind.why_not)
        return kind.name

    def read(self, size: int) -> bytes:
        """Up to `size` bytes, fewer only at the end; moves `offset`."""
        head, self._head = self._head[:size], self._head[size:]
        data = head + self._read(size - len(head))
        self.offset += len(data)
        return data

    def _read(self, size: int) -> bytes:
        parts = []
        while size > 0 and (part := self._file.read(min(size, self._most))):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def _text_blocks(stream: _Stream, size: int) -> Iterator[Block]:
    starts, rest = True, b""
    while True:
        offset = stream.offset - len(rest)
        fresh = stream.read(size)
        data = rest + fresh
        if not fresh:
            if data or starts:
                yield Block(stream.path, "text", offset, 1, data, starts, True)
            return
        cut = _cut(data) if len(data) >= size else 0
        if cut:
            yield Block(stream.path, "text", offset, 1, data[:cut], starts, False)
            starts = False
        rest = data[cut:]


def _jsonl_blocks(stream: _Stream, size: int) -> Iterator[Block]:
    line, waiting, length = 1, [], 0  # waiting: the beginning of a line whose end is not read yet
    while fresh := stream.read(size):
        end, cut = fresh.find(b"\n"), fresh.rfind(b"\n") + 1
        if length + (end if cut else len(fresh)) > LONGEST:
            raise _too_long(f"Line {line}", stream.path, "Check that it is a file of JSON lines; cut the record into several.")
        if cut:
            data = b"".join([*waiting, fresh[:cut]])
            yield Block(stream.path, "jsonl", stream.offset - len(fresh) - length, line, data)
            line, waiting, length = line + data.count(b"\n"), [], 0
        waiting.append(fresh[cut:])
        length += len(fresh) - cut
    if length:
        yield Block(stream.path, "jsonl", stream.offset - length, line, b"".join(waiting))


def _array_blocks(stream: _Stream, size: int) -> Iterator[Block]:
    """The objects of an array, or objects one after another, each brought to one line; numbered from 1."""
    first, rest, opened = 1, b"", 0
    done: list[bytes] = []
    while fresh := stream.read(size):
        data, at = rest + fresh, 0
        for start, end in _objects(data):
            opened += _brackets(data[at:start], stream.path, first + len(done))
            done.append(data[start:end].replace(b"\n", b" ").replace(b"\r", b" "))
            at = end
        rest = data[at:]
        if len(rest) > LONGEST:
            raise _too_long(f"Object {first + len(done)}", stream.path, "Cut the record into several.")
        if done:
            yield Block(stream.path, "array", 0, first, b"\n".join(done))
            first, done = first + len(done), []
    if _brackets(rest, stream.path, first) + opened != 0:
        raise DataError(f"The array in {stream.path!r} has no end.", f"It stops after object {first - 1}.", "Get the file again.")


def _brackets(between: bytes, path: str, number: int) -> int:
    """How many arrays begin less how many end in what stands before object `number`. Raises DataError where there is more than that."""
    if between.strip(b" \t\r\n,[]"):
        why = f"Before object {number}, or in its place, there is something else: {between.strip()[:20].decode('utf-8', 'replace')!r}."
        fix = "The file is neither JSON lines nor an array of objects, or is cut short; correct it or get it again."
        raise DataError(f"{path!r} is not JSON with a document in each object.", why, fix)
    return between.count(b"[") - between.count(b"]")


def _objects(data: bytes) -> Iterator[tuple[int, int]]:
    """(start, end) of the outermost objects in `data` that are whole."""
    depth = start = 0
    for token in _TOKENS.finditer(data):
        mark = data[token.start()]
        if mark == 0x7B:  # {
            start = start if depth else token.start()
            depth += 1
        elif mark == 0x7D:  # }
            depth -= 1
            if depth == 0:
                yield start, token.end()
            depth = max(depth, 0)


def _too_long(what: str, path: str, fix: str) -> DataError:
    return DataError(f"{what} of {path!r} is longer than {LONGEST >> 20} MiB.", "It would have to be in memory at once.", fix)


def _row_blocks(path: str, lots: Iterable[list[bytes | None]], size: int) -> Iterator[Block]:
    """Rows in blocks of about `size` bytes."""
    texts: list[bytes | None] = []
    total, first = 0, 0
    for lot in lots:
        for text in lot:
            texts.append(text)
            total += len(text or b"")
            if total >= size:
                yield _rows(path, first, texts)
                texts, total, first = [], 0, first + len(texts)
    if texts:
        yield _rows(path, first, texts)


def _rows(path: str, first: int, texts: list[bytes | None]) -> Block:
    lengths = tuple(-1 if text is None else len(text) for text in texts)
    return Block(path, "rows", first, first, b"".join(text or b"" for text in texts), lengths=lengths)


# kind -> blocks of a stream, given the size of a block; kind -> lots of rows of a file or dataset, given its name and the field
READERS: dict[str, Callable[[_Stream, int], Iterator[Block]]] = {"text": _text_blocks, "jsonl": _jsonl_blocks, "array": _array_blocks}
ROWS: dict[str, Callable[[str, str], Iterator[list[bytes | None]]]] = {"parquet": rows.parquet, "dataset": rows.dataset}


def _cut(data: bytes) -> int:
    """Where to end a block: a safe cut near the end; 0 when there is none yet and the text may go on growing."""
    for window in (_WINDOW, len(data)):
        start = _character_start(data, max(0, len(data) - window))
        end = _character_start(data, len(data) - 4)
        text = data[start:end].decode("utf-8", "surrogateescape")
        if (cut := last_safe_cut(text)) is not None:
            return start + len(text[:cut].encode("utf-8", "surrogateescape"))
    return _character_start(data, len(data) - 4) if len(data) >= LONGEST else 0


def _character_start(data: bytes, at: int) -> int:
    """`at`, moved back to the start of its UTF-8 character."""
    for back in range(4):
        if at - back <= 0:
            return 0
        if data[at - back] & 0xC0 != 0x80:
            return at - back
    return at
