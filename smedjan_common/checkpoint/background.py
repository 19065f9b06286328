"""Checkpoints are written while training goes on: one thread, at most one write in it."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path


class Background:
    """Runs one write at a time. What it raises, it raises here, in the thread that asks."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._write: Future[Path] | None = None

    def start(self, write: Callable[[], Path]) -> None:
        """Start a write; the one before must have been taken."""
        assert self._write is None
        self._write = self._pool.submit(write)

    def busy(self) -> bool:
        """Whether a write has not ended."""
        return self._write is not None and not self._write.done()

    def take(self, wait: bool = False) -> Path | None:
        """The path of a write that has ended, once; None while there is none. Raises what the write raised."""
        if self._write is None or not (wait or self._write.done()):
            return None
        write, self._write = self._write, None
        return write.result()
