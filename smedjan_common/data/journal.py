"""How far a long `prepare` has come, so that a run that was stopped goes on instead of starting again.

`.X.bin.journal` beside the output names the half-written temporary files, how long they are, and how many bundles of input they hold.
It is written after the files are synced, now and then, and is gone when the run ends. A journal of other inputs, options or tokenizer is
thrown away with its files; one of a process that still runs is left alone.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smedjan_common.files.atomic_file import write_atomically
from smedjan_common.text.sources import Source

EVERY_BYTES = 256 << 20


class Journal:
    """`load()` the state to go on from, `save(bundles, writers)` a new one, `clear()` when done."""

    def __init__(self, output: str | os.PathLike, found: Sequence[Source], options: Sequence[Any], every_bytes: int = EVERY_BYTES):
        self.path = Path(output).with_name(f".{Path(output).name}.journal")
        inputs = [[str(source.path), source.size, os.stat(source.path).st_mtime_ns if source.size else 0] for source in found]
        self.key = hashlib.sha256(json.dumps(["smedjan-journal-1", inputs, list(options)]).encode()).hexdigest()
        self.every_bytes, self.saved, self._waiting = every_bytes, False, 0
        self.usable = True

    def load(self) -> dict[str, Any] | None:
        """{"bundles", "writers": [state of each writer]} of a stopped run of the same work, None to start afresh."""
        try:
            state = json.loads(self.path.read_text(encoding="utf-8"))
            temporaries = [Path(name) for writer in state["writers"] for name in writer["temporary"]]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if state.get("pid") != os.getpid() and _is_running(state.get("pid")):
            self.usable = False  # another process is at the same output; do not touch its files
            return None
        if state.get("key") == self.key and all(writer.fits() for writer in map(_Files, state["writers"])):
            self.saved = True
            return state
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
        self.clear()
        return None

    def step(self, size: int, bundles: int, writers: Sequence[Any]) -> None:
        """Note that `size` more bytes are done; save when enough have come together."""
        self._waiting += size
        if self.usable and self._waiting >= self.every_bytes:
            states = [writer.state() for writer in writers]
            state = {"key": self.key, "pid": os.getpid(), "bundles": bundles, "writers": states}
            write_atomically(self.path, json.dumps(state).encode())
            self.saved, self._waiting = True, 0

    def clear(self) -> None:
        """The work is done or has failed for good."""
        if self.usable:
            self.path.unlink(missing_ok=True)


class _Files:
    def __init__(self, state: dict[str, Any]):
        self._state = state

    def fits(self) -> bool:
        """Whether the temporary files are there and at least as long as the journal says."""
        sizes = (self._state["tokens"] * self._state["itemsize"], self._state["documents"] * 8)
        try:
            return all(os.stat(name).st_size >= size for name, size in zip(self._state["temporary"], sizes, strict=True))
        except OSError:
            return False


def _is_running(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (OSError, ValueError, TypeError):
        return False
    return True
