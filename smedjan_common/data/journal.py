"""How far a long `prepare` has come, so that a run that was stopped goes on instead of starting again.

`.X.bin.journal` beside the output names the half-written files (`.part-…`, beside their outputs), how long they are, and how many bundles
of input they hold. It is written after the files are synced, now and then, and is gone when the run ends. A journal of other inputs,
options or tokenizer is thrown away with its files; one of a process that still runs, here or on another host, is left alone. Nothing is
removed on a journal's word but parts of these outputs.
"""

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from smedjan_common.data.token_file import STOPPED
from smedjan_common.files.atomic_file import name_target, write_atomically
from smedjan_common.files.leftovers import Hidden, host_name, is_alive, is_dead, parse, remove_part
from smedjan_common.files.regular import read_regular
from smedjan_common.text.sources import Source

EVERY_BYTES = 256 << 20
_COUNTS = ("tokens", "documents", "bytes", "itemsize")  # of a writer's state, beside its two `temporary` files


class Journal:
    """`load()` the state to go on from, `step(…)` after each bundle; outputs: the token files, in order.

    `with journal`: it stays where the work is stopped, and goes when it is done or fails for good.
    """

    def __init__(
        self, outputs: Sequence[str | os.PathLike], found: Sequence[Source], options: Sequence[Any], every_bytes: int = EVERY_BYTES
    ):
        self._outputs = [Path(output) for output in outputs]
        self.path = self._outputs[0].with_name(f".{self._outputs[0].name}.journal")
        inputs = [[str(source.path), source.size, _mark(source)] for source in found]
        self.key = hashlib.sha256(json.dumps(["smedjan-journal-2", inputs, list(options)]).encode()).hexdigest()
        self.every_bytes, self.saved, self._waiting = every_bytes, False, 0
        self.usable = True

    def load(self) -> dict[str, Any] | None:
        """{"bundles", "skipped", "writers": [state of each writer]} of a stopped run of the same work, None to start afresh."""
        state = self._read()
        if state is None:
            return None
        parts = self._parts(state)
        if _is_running(state, list(parts)):
            self.usable = False  # another process is at the same output; do not touch its files
            return None
        if state["key"] == self.key and len(state["writers"]) == len(self._outputs) and _are_whole(parts):
            self.saved = True
            return state
        for part in parts:
            remove_part(part)
        self.clear()
        return None

    def _read(self) -> dict[str, Any] | None:
        """The journal; None where there is none, or it is not one that this class writes."""
        try:
            state = {"skipped": 0} | json.loads(read_regular(self.path).decode("utf-8"))
            whole = all(type(state[name]) is int and state[name] >= 0 for name in ("pid", "bundles", "skipped"))
            whole &= all(isinstance(state[name], str) for name in ("key", "host"))
            for writer in state["writers"]:
                whole &= all(type(writer[name]) is int and writer[name] >= 0 for name in _COUNTS)
                whole &= len(writer["temporary"]) == 2 and all(_is_part(name) for name in writer["temporary"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return state if whole else None

    def _parts(self, state: dict[str, Any]) -> dict[Path, int]:
        """The parts with the bytes that each must have: beside their output, or beside the journal where this work has no such output."""
        parts = {}
        for output, writer in zip(itertools.chain(self._outputs, itertools.repeat(self.path)), state["writers"], strict=False):
            sizes = (writer["tokens"] * writer["itemsize"], writer["documents"] * 8)
            parts |= zip([output.with_name(name) for name in writer["temporary"]], sizes, strict=True)
        return parts

    def step(self, size: int, counts: dict[str, int], writers: Sequence[Any]) -> None:
        """Note that `size` more bytes are done; save when enough have come together. `counts`: "bundles" and "skipped" so far."""
        self._waiting += size
        if self.usable and self._waiting >= self.every_bytes:
            states = [writer.state() for writer in writers]
            state = {"key": self.key, "pid": os.getpid(), "host": host_name(), "writers": states} | counts
            with self._by_name():
                write_atomically(self.path, json.dumps(state).encode())
            self.saved, self._waiting = True, 0

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not (self.saved and kind and issubclass(kind, STOPPED)):
            with contextlib.suppress(OSError) if kind else contextlib.nullcontext():  # what failed is told, not what that left
                self.clear()

    def clear(self) -> None:
        """The work is done or has failed for good."""
        if self.usable:
            with self._by_name():
                self.path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _by_name(self) -> Iterator[None]:
        """Errors of writing name the output, not the hidden journal."""
        try:
            yield
        except OSError as error:
            name_target(error, self.path, self._outputs[0])
            raise


def _mark(source: Source) -> int | str:
    """What changes with the content of an input."""
    if source.mark or not source.size or not isinstance(source.path, Path):
        return source.mark or 0
    return os.stat(source.path).st_mtime_ns


def _is_part(name: Any) -> bool:
    found = parse(name) if isinstance(name, str) else None
    return found is not None and found.kind == "part"


def _are_whole(parts: dict[Path, int]) -> bool:
    try:
        return all(os.stat(part).st_size >= size for part, size in parts.items())
    except OSError:
        return False


def _is_running(state: dict[str, Any], parts: Sequence[Path]) -> bool:
    """Whether another process still writes the parts of a journal."""
    here = state["host"] == host_name()
    if here and state["pid"] == os.getpid():
        return False
    writer = Hidden("part", "", state["pid"], state["host"])
    standing = [part for part in parts if part.is_file()]
    try:
        return not all(is_dead(part, writer) for part in standing) if standing else here and is_alive(state["pid"])
    except OSError:  # parts that may not be opened are not ours to go on with
        return True
