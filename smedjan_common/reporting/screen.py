"""Where a run is shown: lines, or on a terminal one live display beneath the lines (reporting/live.py).

a terminal                       the display; NO_COLOR takes its colours alone
a pipe, CI, TERM=dumb or unset   plain lines
"""

import contextlib
import sys
import time
from collections.abc import Iterator

from smedjan_common.reporting.console import lasted, say
from smedjan_common.reporting.pace import Pace
from smedjan_common.reporting.status import Status
from smedjan_common.streams import put_now

COMPILING, EVALUATING, SAMPLING, SAVING = "compiling", "evaluating", "sampling", "saving"


class Screen:
    """Lines alone. A context: what is shown beside lines is taken away at its end."""

    drawn = False  # whether a display is under the lines

    def __init__(self, status: Status, pace: Pace):
        self.status, self.pace = status, pace

    def __enter__(self) -> "Screen":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """A context in which the run does that instead of training."""
        self.status.doing, self.status.since = what, time.perf_counter()
        self._begins(what)
        try:
            with self.pace.spending(what):
                yield
        finally:
            self.status.doing = ""
        if what == COMPILING:
            say(f"compiled, with the first step, in {lasted(self.pace.spent[what])}")

    def announce(self, notice: str) -> bool:
        """Say at once, from any thread and without waiting, what a signal does; returns whether a line says it now."""
        return put_now(notice, sys.stdout)

    def _begins(self, what: str) -> None:
        if what == COMPILING:
            say("compiling …")
