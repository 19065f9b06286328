"""A tracker in a thread of its own: it may be slow, raise or hang, and training notices nothing. What goes wrong is told once."""

import functools
import queue
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from smedjan_common.reporting.metrics import Row
from smedjan_common.reporting.trackers import NONE, Start, Tracker, figures, make_tracker, start_of

WAITING = 1000  # rows that may wait for a tracker that is slow
PATIENCE = 30.0  # seconds that a run waits at its end: a short one ends before a large package is imported


def begin_tracking(
    names: Iterable[str], folder: Path, step: int, config: dict[str, Any], tell: Callable[[str], object]
) -> "list[Tracking]":
    """The trackers of a run that goes on after `step`."""
    begun = []
    for name in names:
        if name == NONE:
            continue
        try:
            begun.append(Tracking(name, functools.partial(make_tracker, name), start_of(name, folder, step, config), tell))
        except (OSError, ValueError) as error:  # the latter: what holds the run's id is no text
            tell(f"note: the tracker {name} did not begin: {getattr(error, 'strerror', None) or error}.")
    return begun


class Tracking:
    """make: makes the tracker, in its thread. tell: says a line, in the thread that calls `log`, `text` or `finish`."""

    def __init__(self, name: str, make: Callable[[], Tracker], start: Start, tell: Callable[[str], object]):
        self.name, self._tell = name, tell
        self._calls: queue.Queue[tuple[str, tuple[Any, ...]]] = queue.Queue(WAITING)
        self._wrong, self._told = "", False
        self._thread = threading.Thread(target=self._run, args=(make, start), name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log(self, row: Row) -> None:
        """Pass on the figures of a row; waits for nothing."""
        if known := figures(row):
            self._put("log", row["step"], known)

    def text(self, step: int, text: str) -> None:
        """Pass on a sample; waits for nothing."""
        self._put("text", step, text)

    def finish(self, exit_code: int, patience: float = PATIENCE) -> None:
        """The run ended: wait for the tracker, `patience` seconds at most."""
        self._put("finish", exit_code)
        self._thread.join(patience)
        if self._thread.is_alive() and not self._wrong:
            self._wrong = f"it had not taken everything {patience:g} s after the end"
        self._speak()

    def _put(self, call: str, *arguments: Any) -> None:
        try:
            self._calls.put_nowait((call, arguments))
        except queue.Full:
            self._wrong = self._wrong or f"it is too slow: {WAITING} rows wait for it, and more are dropped"
        self._speak()

    def _run(self, make: Callable[[], Tracker], start: Start) -> None:
        try:
            tracker = make()
            tracker.start(start)
            while True:
                call, arguments = self._calls.get()
                getattr(tracker, call)(*arguments)
                if call == "finish":
                    return
        except BaseException as error:  # SystemExit and KeyboardInterrupt of a program that is not ours too
            self._wrong = f"{type(error).__name__}: {error}".splitlines()[0][:200].rstrip(".: ")

    def _speak(self) -> None:
        if self._wrong and not self._told:
            self._told = True
            self._tell(
                f"note: the tracker {self.name} has not all of this run ({self._wrong}). metrics.jsonl has; `smedjan track` replays it."
            )
