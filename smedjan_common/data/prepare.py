"""Text to token files: read in blocks, tokenise in processes, write train and validation files in the order of the inputs.

Every document is its tokens followed by <|endoftext|>. The sidecar's offsets say where each document starts.

Validation split, always the same for the same inputs:
- by document, where enough documents are expected on the validation side: a document goes there when the hash of its text (of its
  first block, for a long one) is below the fraction;
- else the tail: of each text file the last part from a line break on, of other sources the last documents.
Only the tokens differ by tokenizer, not the split.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from smedjan_common.data.journal import EVERY_BYTES, Journal
from smedjan_common.data.token_file import TokenFileWriter
from smedjan_common.errors import DataError
from smedjan_common.executors import start
from smedjan_common.text.blocks import Block, blocks, bundles
from smedjan_common.text.compressed import COMPRESSED
from smedjan_common.text.cuts import mend_surrogates
from smedjan_common.text.documents import documents
from smedjan_common.text.sources import Source, find, much, refuse_pipes, total_size
from smedjan_common.tokenizer import Tokenizer

TRAIN, VAL, BY_HASH = 0, 1, 2
_ENOUGH_VALIDATION_DOCUMENTS = 20
_HASH_RANGE = float(1 << 64)


@dataclass(frozen=True)
class Summary:
    """What `prepare` wrote. Bytes are UTF-8 bytes of text, without the tokens between documents."""

    output: str
    tokens: int
    documents: int
    bytes: int
    val_output: str | None
    val_tokens: int
    val_documents: int
    val_bytes: int
    split: str  # "none", "document" or "tail"
    seconds: float
    skipped: int = 0  # documents without any text, null included
    resumed: bool = False  # whether it went on from a run that was stopped

    @property
    def bytes_per_token(self) -> float:
        """Compression: text bytes per token, both sides together."""
        return (self.bytes + self.val_bytes) / max(1, self.tokens + self.val_tokens)


@dataclass(frozen=True)
class Piece:
    """A block on its way to a worker. `side`: TRAIN, VAL or BY_HASH (decided per document)."""

    block: Block
    side: int
    first_val_document: int | None = None  # tail mode, many documents: those of the block from this number on are validation


def prepare(
    inputs: Iterable[str | os.PathLike],
    output: str | os.PathLike,
    tokenizer: Tokenizer,
    *,
    val_output: str | os.PathLike | None = None,
    val_fraction: float = 0.0,
    field: str = "text",
    workers: int | None = None,
    executor: str = "local",
    progress: Callable[[int, int], None] | None = None,
    errors: str = "strict",
    journal_bytes: int = EVERY_BYTES,
) -> Summary:
    """Write `output` (and `val_output`) from text, JSONL, directories and globs. `progress(bytes done, bytes in all)`.

    `errors`: "strict" refuses bytes that are not UTF-8, "replace" makes them U+FFFD. Raises DataError, OSError; nothing half-written
    is left then, and older files of these names stay as they were. A run that is killed, or stopped by Ctrl-C or a lack of memory after
    `journal_bytes` of input, leaves a journal and goes on from there when it is called again with the same arguments and inputs.
    """
    _check(val_output, val_fraction, errors)
    started = time.monotonic()
    found = find(inputs, field=field)
    if val_output:
        refuse_pipes(found, "To hold out a part of it, it is measured first and then read.")
    split = _choose_split(found, val_fraction, field) if val_output else "none"
    ends = {"eot_id": tokenizer.eot_id, "bos_id": tokenizer.bos_id}
    notes = {"pattern": tokenizer.pattern, **ends, "split": split, "val_fraction": val_fraction if val_output else 0.0}
    outputs = [(path, side) for path, side in ((output, "train"), (val_output, "validation")) if path is not None]
    options = [tokenizer.hash, tokenizer.bos_id, split, val_fraction, field, errors, [os.fspath(path) for path, _ in outputs]]
    journal = Journal([path for path, _ in outputs], found, options, journal_bytes)
    state = journal.load()
    with journal, ExitStack() as stack:
        writers = []
        for number, (path, side) in enumerate(outputs):
            resume = state["writers"][number] if state else None
            writers.append(stack.enter_context(TokenFileWriter(path, tokenizer.vocab_size, tokenizer.hash, notes | {"side": side}, resume)))
            writers[-1].keep_when_stopped = journal.saved
        work = _Work(found, tokenizer, field, errors, workers, executor, val_fraction, progress)
        before = (state["bundles"], state["skipped"]) if state else (0, 0)
        seen, skipped = work.write(writers, _pieces(found, split, val_fraction, field), journal, *before)
        _refuse_empty(writers, found, val_fraction)
        for writer in writers:
            writer.manifest["sources"] = seen
    val = writers[1] if len(writers) > 1 else None
    return Summary(
        os.fspath(output),
        writers[0].num_tokens,
        writers[0].num_documents,
        writers[0].num_bytes,
        os.fspath(val_output) if val_output else None,
        val.num_tokens if val else 0,
        val.num_documents if val else 0,
        val.num_bytes if val else 0,
        split,
        time.monotonic() - started,
        skipped,
        state is not None,
    )


@dataclass(frozen=True)
class _Work:
    """Everything that tokenising needs to know."""

    found: Sequence[Source]
    tokenizer: Tokenizer
    field: str
    errors: str
    processes: int | None
    executor: str
    val_fraction: float
    progress: Callable[[int, int], None] | None

    def write(
        self, writers: Sequence[TokenFileWriter], pieces: Iterator[Piece], journal: Journal, skip: int, skipped: int
    ) -> tuple[list[dict[str, Any]], int]:
        """Tokenise and write all bundles but the first `skip`, which had `skipped` documents without text.

        Returns (what was read of each source: [{path, bytes, sha256}], documents without text in all).
        """
        total = total_size(self.found)
        reader = _Reader(self.found, pieces, skip)
        arguments = (self.tokenizer, self.field, self.errors, self.val_fraction)
        with start(self.executor, "smedjan_common.data.prepare:Tokenise", arguments, self.processes, much(self.found)) as pool:
            for number, (size, sides, empty) in enumerate(pool.map(reader.bundles()), skip + 1):
                for writer, (tokens, starts, text_bytes) in zip(writers, sides, strict=False):
                    writer.append(tokens, starts, text_bytes)
                reader.done, skipped = reader.done + size, skipped + empty
                if self.progress:
                    self.progress(min(reader.done, total), total)
                journal.step(size, {"bundles": number, "skipped": skipped}, writers)
                for writer in writers:
                    writer.keep_when_stopped = journal.saved
        return reader.seen(), skipped


class _Reader:
    """Bundles of pieces, hashed as they are read; those that are in the files already are read for their hashes only."""

    def __init__(self, found: Sequence[Source], pieces: Iterator[Piece], skip: int):
        self._pieces, self._skip, self.done = pieces, skip, 0
        self._hashes = {str(source.path): hashlib.sha256() for source in found}
        self._sizes = dict.fromkeys(self._hashes, 0)

    def bundles(self) -> Iterator[list[Piece]]:
        for number, bundle in enumerate(bundles(self._hashed(), of=lambda piece: len(piece.block.data))):
            if number >= self._skip:
                yield bundle
            else:
                self.done += sum(len(piece.block.data) for piece in bundle)

    def _hashed(self) -> Iterator[Piece]:
        for piece in self._pieces:
            self._hashes[piece.block.path].update(piece.block.data)
            self._sizes[piece.block.path] += len(piece.block.data)
            yield piece

    def seen(self) -> list[dict[str, Any]]:
        return [{"path": path, "bytes": self._sizes[path], "sha256": sha.hexdigest()} for path, sha in self._hashes.items()]


class Tokenise:
    """What runs in each process: pieces -> (their size, for each side (tokens, document starts, text bytes), documents without text)."""

    def __init__(self, tokenizer: Tokenizer, field: str, errors: str, val_fraction: float):
        self._tokenizer, self._field, self._errors = tokenizer, field, errors
        self._end, self._begin = tokenizer.eot_id, tokenizer.bos_id
        self._limit = val_fraction * _HASH_RANGE

    def __call__(self, pieces: list[Piece]) -> tuple[int, list[tuple[np.ndarray, np.ndarray, int]], int]:
        empty, texts, rows = 0, [], []  # rows: (side, text bytes, whether a document starts here, whether it ends here)
        for piece in pieces:
            block = piece.block
            for number, text in enumerate(documents(block, self._field, self._errors)):
                if not text and block.starts and block.ends:
                    empty += 1
                    continue
                try:
                    data = text.encode()
                except UnicodeEncodeError:  # a lone surrogate, which JSON can write as an escape
                    text = mend_surrogates(text)
                    data = text.encode()
                texts.append(text)
                rows.append((self._side(piece, number, data), len(data), block.starts, block.ends))
        side, sizes, starts, ends = np.array(rows, np.int64).reshape(-1, 4).T
        ids, counts = self._tokenizer.encode_parts(texts, starts == 1)
        if self._begin is not None:
            ids = np.insert(ids, (np.cumsum(counts) - counts)[starts == 1], self._begin)
            counts = counts + starts
        ids = np.insert(ids, np.cumsum(counts)[ends == 1], self._end)
        counts = counts + ends
        size = sum(len(piece.block.data) for piece in pieces)
        return size, [_one_side(ids, counts, side == number, sizes, starts == 1) for number in (TRAIN, VAL)], empty

    def _side(self, piece: Piece, number: int, data: bytes) -> int:
        if piece.side == BY_HASH:
            return VAL if document_hash(data) < self._limit else TRAIN
        if piece.first_val_document is not None:
            return VAL if number >= piece.first_val_document else TRAIN
        return piece.side


def _one_side(
    ids: np.ndarray, counts: np.ndarray, mine: np.ndarray, sizes: np.ndarray, starts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """Of texts given by ids [total] and counts [texts], those of one side: (ids, where documents start in them, text bytes)."""
    own = counts[mine]
    first = (np.cumsum(own) - own)[starts[mine]]
    return ids if mine.all() else ids[np.repeat(mine, counts)], first.astype(np.uint64), int(sizes[mine].sum())


def document_hash(data: bytes) -> int:
    """64 bits of blake2b over a document's text; decides its side."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _pieces(found: Sequence[Source], split: str, val_fraction: float, field: str) -> Iterator[Piece]:
    """Every block with the side it goes to."""
    if split == "tail":
        for source in found:
            yield from _text_tail(source, val_fraction) if source.kind == "text" else _document_tail(source, val_fraction, field)
        return
    side = TRAIN
    for block in blocks(found, field=field):
        if split == "none" or (block.starts and block.ends):
            yield Piece(block, TRAIN if split == "none" else BY_HASH)
            continue
        if block.starts:
            side = VAL if document_hash(block.data) < val_fraction * _HASH_RANGE else TRAIN
        yield Piece(block, side)


def _text_tail(source: Source, val_fraction: float) -> Iterator[Piece]:
    """A text file's blocks, cut once where the validation part begins: at a line break if one is near, else between characters."""
    wanted = int(_content_size(source) * (1 - val_fraction))
    side = TRAIN
    for block in blocks([source]):
        cut = wanted - block.offset
        if side == TRAIN and cut < len(block.data):
            cut = _line_start(block.data, max(cut, 0))
            if cut:
                yield Piece(replace(block, data=block.data[:cut], ends=True), TRAIN)
            side, block = VAL, replace(block, data=block.data[cut:], offset=block.offset + cut, starts=True)
            if not block.data and block.ends:
                return
        yield Piece(block, side)


def _line_start(data: bytes, at: int) -> int:
    """The first line start at or after `at`, else the last before it, else the start of a word, else of a character."""
    after = data.find(b"\n", max(at - 1, 0)) + 1
    if 0 < after < len(data):
        return after
    for mark in (b"\n", b" "):
        before = data.rfind(mark, 0, at) + 1
        if before:
            return before
    while 0 < at < len(data) and data[at] & 0xC0 == 0x80:
        at -= 1
    return at


def _document_tail(source: Source, val_fraction: float, field: str) -> Iterator[Piece]:
    """The blocks of a source of many documents; the last documents, at least one if there are two, are validation."""
    total = sum(block.count() for block in blocks([source], field=field))
    first = min(total - round(total * val_fraction), total - 1) if total > 1 else total
    seen = 0
    for block in blocks([source], field=field):
        yield Piece(block, TRAIN, first - seen)
        seen += block.count()


def _choose_split(found: Sequence[Source], val_fraction: float, field: str) -> str:
    """ "document" where enough documents are expected on the validation side, else "tail"."""
    needed = _ENOUGH_VALIDATION_DOCUMENTS / val_fraction
    count = sum(source.kind == "text" for source in found)
    for source in found:
        for block in blocks([source], field=field) if source.kind != "text" else ():
            if count >= needed:
                return "document"
            count += block.count()
    return "document" if count >= needed else "tail"


def _content_size(source: Source) -> int:
    """Decompressed bytes."""
    if source.size and source.path.suffix.lower() not in COMPRESSED:
        return source.size
    return sum(len(block.data) for block in blocks([source]))


def _check(val_output: str | os.PathLike | None, val_fraction: float, errors: str) -> None:
    if val_output and not 0 < val_fraction < 1:
        raise DataError(
            f"A validation fraction of {val_fraction} splits nothing.", "", "Give --val-fraction between 0 and 1, such as 0.05."
        )
    if val_fraction and not val_output:
        raise DataError("There is nowhere to put the validation part.", "--val-fraction was given without --val-output.", "Give both.")
    if errors not in ("strict", "replace"):
        raise DataError(f"There is no way {errors!r} to treat bytes that are not UTF-8.", "", "Choose strict or replace.")


def _refuse_empty(writers: Sequence[TokenFileWriter], found: Sequence[Source], val_fraction: float) -> None:
    if not any(writer.num_bytes for writer in writers):
        raise DataError("All inputs are empty.", f"{len(found)} files were read, the first {str(found[0].path)!r}.", "Give some text.")
    for writer, side in zip(writers, ("training", "validation"), strict=False):
        if not writer.num_bytes:
            raise DataError(f"No text is left for {side}.", f"The text is too small to hold out {val_fraction:g} of it.", "Give more text.")
