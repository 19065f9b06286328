"""The token file: one flat array of token ids on disk, mapped rather than read, with what it was made of beside it.

    X.bin          raw little-endian uint16 (vocabulary <= 65536) or uint32, nothing else
    X.bin.json     the manifest: dtype, counts, tokenizer hash, SHA-256 of X.bin, sources
    X.bin.offsets  uint64: where each document starts, in tokens
    X.bin.mask     uint8, of conversations: 1 where the token is trained as a target, 0 where it is only read

They appear together, whole, or not at all: they are written under temporary names and renamed, the manifest last.
"""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from smedjan_common import __version__
from smedjan_common.errors import DataError, OutOfMemoryError, WorkerError
from smedjan_common.files.atomic_file import name_target
from smedjan_common.files.durable import sync, sync_directory
from smedjan_common.files.hashing import file_hash
from smedjan_common.files.json_bytes import json_bytes
from smedjan_common.files.leftovers import hidden, lock, remove_parts
from smedjan_common.files.regular import read_regular
from smedjan_common.nearby import beside
from smedjan_common.remote.address import is_remote

FORMAT_VERSION = 1
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_REQUIRED = {
    "format_version": int,
    "dtype": str,
    "tokens": int,
    "documents": int,
    "vocab_size": int,
    "tokenizer_hash": str,
    "sha256": str,
}
STOPPED = (KeyboardInterrupt, MemoryError, OutOfMemoryError, WorkerError)  # the work may go on another time, with fewer workers, say
_MASK = "mask_sha256"  # in the manifest of a file with a mask
_OFFSETS = "offsets_sha256"  # in the manifest; files of an older smedjan lack it
_AT_ONCE = 1 << 24  # tokens looked at together
_REMAKE = "Make it again: smedjan prepare."
_REMAKE_CHATS = "Remove the token file, and make it again: smedjan sft --dataset CHATS."


def dtype_for(vocab_size: int) -> np.dtype:
    """The smallest of the two dtypes that holds every id."""
    return DTYPES["uint16" if vocab_size <= 1 << 16 else "uint32"]


def manifest_path(path: Path) -> Path:
    """X.bin -> X.bin.json"""
    return path.with_name(path.name + ".json")


def offsets_path(path: Path) -> Path:
    """X.bin -> X.bin.offsets"""
    return path.with_name(path.name + ".offsets")


def mask_path(path: Path) -> Path:
    """X.bin -> X.bin.mask"""
    return path.with_name(path.name + ".mask")


class TokenFile:
    """An open token file. `tokens`: np.memmap uint16/uint32 [num_tokens]; `documents`: np.memmap uint64 [documents] or None; `mask`:
    np.memmap uint8 [num_tokens], or None where every token is trained; `pairs`: whether documents 2i and 2i + 1 are two answers, the first
    one better. `hash`: of the tokens, and of the mask where there is one."""

    def __init__(
        self, path: Path, manifest: dict[str, Any], tokens: np.ndarray, documents: np.ndarray | None, mask: np.ndarray | None = None
    ):
        self.path, self.manifest, self.tokens, self.documents, self.mask = path, manifest, tokens, documents, mask
        self.num_tokens: int = manifest["tokens"]
        self.num_bytes: int | None = manifest.get("bytes")
        self.vocab_size: int = manifest["vocab_size"]
        self.tokenizer_hash: str = manifest["tokenizer_hash"]
        self.pairs = mask is not None and manifest.get("kind") == "pairs"
        self.hash: str = manifest["sha256"]
        if mask is not None:
            self.hash = hashlib.sha256(f"{manifest['sha256']}:{manifest[_MASK]}".encode()).hexdigest()

    @classmethod
    def open(cls, path: str | os.PathLike) -> "TokenFile":
        """Map the file; one at an address is brought to the cache first (fetched.py).

        Raises DataError for a missing or damaged manifest, another size than it says, a dtype that cannot hold the ids,
        an id beyond the vocabulary, a mask that is missing or was changed. The largest id stands in the manifest; a file whose manifest
        lacks it is read once, and so is a mask."""
        if is_remote(path):
            from smedjan_common.data.fetched import fetched

            path = fetched(os.fspath(path))
        path = Path(path)
        if not path.is_file():
            raise DataError(
                f"There is no token file {str(path)!r}.",
                beside(path),
                "Say where it is, or make one: smedjan prepare --input TEXT --output train.bin.",
            )
        manifest = _read_manifest(path)
        dtype = DTYPES[manifest["dtype"]]
        size, needed = path.stat().st_size, manifest["tokens"] * dtype.itemsize
        if size != needed:
            state = "cut short" if size < needed else "too long"
            raise DataError(f"The token file {str(path)!r} is {state}.", f"Its manifest promises {needed} bytes, it has {size}.", _REMAKE)
        tokens = _map(path, dtype)
        _check_ids(path, manifest, tokens)
        return cls(path, manifest, tokens, _map_offsets(path, manifest["documents"]), _map_mask(path, manifest))

    def verify(self) -> None:
        """Read the whole file and compare its SHA-256 with the manifest. Raises DataError."""
        found = file_hash(self.path)
        if found != (written := self.manifest["sha256"]):
            raise DataError(f"The token file {str(self.path)!r} was changed.", f"Its SHA-256 is {found}, not {written}.", _REMAKE)
        written = self.manifest.get(_OFFSETS)
        if self.documents is not None and written and (found := file_hash(place := offsets_path(self.path))) != written:
            raise DataError(f"The document offsets {str(place)!r} were changed.", f"Their SHA-256 is {found}, not {written}.", _REMAKE)

    def check_tokenizer(self, tokenizer_hash: str) -> None:
        """Raises DataError when the file was made with another tokenizer."""
        if tokenizer_hash != self.tokenizer_hash:
            raise DataError(
                f"The token file {str(self.path)!r} was made with another tokenizer.",
                f"Its tokenizer has hash {self.tokenizer_hash[:16]}…, this one {tokenizer_hash[:16]}….",
                "Give the tokenizer it was made with, or prepare the text again.",
            )


class TokenFileWriter:
    """Writes a token file piece by piece. `with TokenFileWriter(path, …) as writer: writer.append(…)`; an error leaves nothing behind.

    `finish()` or the end of the block without an error gives the files their names. `resume`: the `state()` of a writer that was
    stopped; `keep_when_stopped`: what is STOPPED leaves its temporary files, for a journal that names them. `masked`: it has a mask too.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        vocab_size: int,
        tokenizer_hash: str,
        manifest: Mapping[str, Any] | None = None,
        resume: Mapping[str, Any] | None = None,
        masked: bool = False,
    ):
        assert not (masked and resume), "files with a mask are written in one go"
        self.path = Path(path)
        self.manifest: dict[str, Any] = dict(manifest or {})
        self.vocab_size, self.tokenizer_hash = vocab_size, tokenizer_hash
        self.dtype = dtype_for(vocab_size)
        self.num_tokens, self.num_documents, self.num_bytes, self._max_id = 0, 0, 0, -1
        self._sha, self._offsets_sha, self._mask_sha = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
        self._mask: BinaryIO | None = None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        finals = (self.path, offsets_path(self.path), manifest_path(self.path))
        if masked:
            finals = (*finals[:2], mask_path(self.path), finals[2])
        self._temporary = {final: hidden("part", final) for final in finals}
        self.keep_when_stopped = False
        if resume:
            self._temporary |= {final: final.with_name(name) for final, name in zip(finals[:2], resume["temporary"], strict=True)}
        for final, temporary in self._temporary.items():
            remove_parts(final, keep=[temporary])
        if resume:
            self._resume(resume, finals)
            return
        with self._by_name():
            self._tokens: BinaryIO | None = open(self._temporary[finals[0]], "xb")  # noqa: SIM115
            self._offsets: BinaryIO | None = open(self._temporary[finals[1]], "xb")  # noqa: SIM115
            if masked:
                self._mask = open(self._temporary[finals[2]], "xb")  # noqa: SIM115
        self._lock()

    def _resume(self, state: Mapping[str, Any], finals: Sequence[Path]) -> None:
        """Open the temporary files of a stopped writer and go back to where its state was taken."""
        self.num_tokens, self.num_documents, self.num_bytes = state["tokens"], state["documents"], state["bytes"]
        self._tokens = open(self._temporary[finals[0]], "r+b")  # noqa: SIM115
        self._offsets = open(self._temporary[finals[1]], "r+b")  # noqa: SIM115
        self._lock()
        self._tokens.truncate(self.num_tokens * self.dtype.itemsize)
        self._offsets.truncate(self.num_documents * 8)
        while data := self._tokens.read(1 << 24):
            self._sha.update(data)
            self._max_id = max(self._max_id, int(np.frombuffer(data, self.dtype).max()))
        while data := self._offsets.read(1 << 24):
            self._offsets_sha.update(data)

    def _lock(self) -> None:
        """Held while they are written: who sweeps parts, or finds a journal of another host, sees that their writer lives."""
        for file in (self._tokens, self._offsets):
            assert file is not None
            lock(file.fileno())

    def state(self) -> dict[str, Any]:
        """Sync what was written; what `resume` needs."""
        for file in (self._tokens, self._offsets):
            assert file is not None
            file.flush()
            sync(file.fileno())
        names = [temporary.name for temporary in list(self._temporary.values())[:2]]
        counts = {"tokens": self.num_tokens, "documents": self.num_documents, "bytes": self.num_bytes}
        return {"temporary": names, "itemsize": self.dtype.itemsize} | counts

    def append(self, tokens: np.ndarray, document_starts: np.ndarray, num_bytes: int, mask: np.ndarray | None = None) -> None:
        """More tokens [n]; `document_starts` [d]: where in them documents begin; `num_bytes`: UTF-8 bytes of text they stand for; `mask`
        bool [n]: which are trained, of a file that has a mask.

        Raises DataError for an id that is not of the vocabulary.
        """
        assert self._tokens is not None, "the writer is closed"
        assert self._offsets is not None
        if self._mask is not None:
            assert mask is not None
            assert len(mask) == len(tokens)
            trained = np.ascontiguousarray(mask, np.uint8).tobytes()
            self._mask.write(trained)
            self._mask_sha.update(trained)
        if len(tokens):
            self._max_id = max(self._max_id, int(np.max(tokens)))
            if self._max_id >= self.vocab_size:
                raise _beyond(self.path, self._max_id, self.vocab_size)
        data = np.ascontiguousarray(tokens, self.dtype).data.cast("B") if len(tokens) else b""
        self._tokens.write(data)
        self._sha.update(data)
        starts = (np.asarray(document_starts, np.uint64) + np.uint64(self.num_tokens)).astype("<u8").tobytes()
        self._offsets.write(starts)
        self._offsets_sha.update(starts)
        self.num_tokens += len(tokens)
        self.num_documents += len(document_starts)
        self.num_bytes += num_bytes

    def finish(self) -> dict[str, Any]:
        """Sync, rename, return the manifest."""
        manifest = {
            "format_version": FORMAT_VERSION,
            "dtype": self.dtype.name,
            "tokens": self.num_tokens,
            "documents": self.num_documents,
            "bytes": self.num_bytes,
            "vocab_size": self.vocab_size,
            "max_id": self._max_id,
            "tokenizer_hash": self.tokenizer_hash,
            "sha256": self._sha.hexdigest(),
            _OFFSETS: self._offsets_sha.hexdigest(),
            **({_MASK: self._mask_sha.hexdigest()} if self._mask else {}),
            **self.manifest,
            "created_by": f"smedjan {__version__}",
        }
        for file in filter(None, (self._tokens, self._offsets, self._mask)):
            _sync_and_close(file)
        self._tokens = self._offsets = self._mask = None
        with open(self._temporary[manifest_path(self.path)], "xb") as file:
            file.write(json_bytes(manifest, indent=1) + b"\n")
            _sync_and_close(file)
        manifest_path(self.path).unlink(missing_ok=True)  # an old manifest never stands beside new tokens
        for final, temporary in self._temporary.items():
            os.replace(temporary, final)
        sync_directory(self.path.parent)
        return manifest

    def close(self) -> None:
        """Close the temporary files and leave them."""
        for file in filter(None, (self._tokens, self._offsets, self._mask)):
            file.close()
        self._tokens = self._offsets = self._mask = None

    def abort(self) -> None:
        """Close and remove what was written."""
        self.close()
        for temporary in self._temporary.values():
            with contextlib.suppress(OSError):  # a disk that is read only says so even of what is not there
                temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _by_name(self) -> Iterator[None]:
        """Errors of writing name the token file, not the hidden ones."""
        try:
            yield
        except OSError as error:
            self._name(error)
            raise

    def _name(self, error: BaseException) -> None:
        for temporary in self._temporary.values():
            name_target(error, temporary, self.path)

    def __enter__(self) -> "TokenFileWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        try:
            if error:
                self._name(error)
            elif self._tokens is not None:
                with self._by_name():
                    self.finish()
        finally:
            if self.keep_when_stopped and kind and issubclass(kind, STOPPED):
                self.close()
            else:
                self.abort()


def _read_manifest(path: Path) -> dict[str, Any]:
    place = manifest_path(path)
    try:
        manifest = json.loads(read_regular(place).decode("utf-8"))
    except FileNotFoundError:
        raise DataError(f"The token file {str(path)!r} has no manifest.", f"There is no {str(place)!r}.", _REMAKE) from None
    except ValueError as error:
        raise DataError(f"The manifest {str(place)!r} cannot be read.", f"It is not JSON ({error}).", _REMAKE) from None
    for field, kind in _REQUIRED.items():
        value = manifest.get(field) if isinstance(manifest, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise DataError(
                f"The manifest {str(place)!r} is incomplete.", f"The field {field!r} is missing or has the wrong type.", _REMAKE
            )
    if manifest["format_version"] > FORMAT_VERSION:
        why = f"It has format version {manifest['format_version']}, this smedjan reads up to {FORMAT_VERSION}."
        raise DataError(f"The token file {str(path)!r} is newer than this smedjan.", why, "Update smedjan.")
    if manifest["dtype"] not in DTYPES:
        why = f"Its dtype is {manifest['dtype']!r}, not one of {', '.join(DTYPES)}."
        raise DataError(f"The manifest {str(place)!r} has a wrong dtype.", why, _REMAKE)
    if manifest["vocab_size"] > 1 << 16 and manifest["dtype"] == "uint16":
        why = f"A vocabulary of {manifest['vocab_size']} does not fit uint16."
        raise DataError(f"The manifest {str(place)!r} has a wrong dtype.", why, _REMAKE)
    return manifest


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    """The file as a read-only array; an empty one cannot be mapped. Big-endian machines are refused."""
    assert sys.byteorder == "little", "token files are little-endian"
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


def _check_ids(path: Path, manifest: dict[str, Any], tokens: np.ndarray) -> None:
    """Raises DataError where an id is beyond the vocabulary: it would be another token's row, or none."""
    largest = manifest.get("max_id")
    if type(largest) is not int:
        largest = max((int(tokens[first : first + _AT_ONCE].max()) for first in range(0, len(tokens), _AT_ONCE)), default=-1)
    if largest >= manifest["vocab_size"]:
        raise _beyond(path, largest, manifest["vocab_size"])


def _beyond(path: Path, largest: int, vocab_size: int) -> DataError:
    what = f"The token file {str(path)!r} has token {largest}, which its vocabulary does not have."
    return DataError(
        what, f"A vocabulary of {vocab_size} ends at token {vocab_size - 1}.", "Prepare it again with the tokenizer of the run."
    )


def _map_offsets(path: Path, documents: int) -> np.ndarray | None:
    place = offsets_path(path)
    if not place.is_file():
        return None
    if place.stat().st_size != documents * 8:
        why = f"It should hold {documents} offsets of 8 bytes, it has {place.stat().st_size} bytes."
        raise DataError(f"The document offsets {str(place)!r} are damaged.", why, _REMAKE)
    return _map(place, np.dtype("<u8"))


def _map_mask(path: Path, manifest: Mapping[str, Any]) -> np.ndarray | None:
    if _MASK not in manifest:
        return None
    place = mask_path(path)
    if not place.is_file():
        raise DataError(f"The token file {str(path)!r} has no mask.", f"There is no {str(place)!r}.", _REMAKE_CHATS)
    if (size := place.stat().st_size) != manifest["tokens"]:
        why = f"It should hold {manifest['tokens']} bytes, it has {size}."
        raise DataError(f"The mask {str(place)!r} is damaged.", why, _REMAKE_CHATS)
    if (found := file_hash(place)) != manifest[_MASK]:
        raise DataError(f"The mask {str(place)!r} was changed.", f"Its SHA-256 is {found}, not {manifest[_MASK]}.", _REMAKE_CHATS)
    return _map(place, np.dtype(np.uint8))


def _sync_and_close(file: BinaryIO) -> None:
    file.flush()
    sync(file.fileno())
    file.close()
