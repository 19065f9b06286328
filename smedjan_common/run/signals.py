"""SIGINT, SIGTERM, SIGHUP: the first asks the loop to finish its step and save, a second one ends the process at once.

SIGHUP comes when the terminal is closed, and often twice: from the kernel and from the shell. So it never is the second one.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from smedjan_common.reporting.console import say


@contextlib.contextmanager
def interrupt_ends_at_once() -> Iterator[None]:
    """A context in which SIGINT ends the process without a KeyboardInterrupt: importing a framework may swallow one, and then the
    program goes on, or crash by it. For places with nothing to save."""
    raises = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if raises:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if raises:
            signal.signal(signal.SIGINT, signal.default_int_handler)


class StopSignals:
    """A context in which `received` is the number of the first stop signal, or 0.

    After it the system's own handling is back, so that a second signal ends the process even inside a long call of a framework.
    """

    HANG_UP = getattr(signal, "SIGHUP", None)  # Windows has none
    SIGNALS = (signal.SIGINT, signal.SIGTERM, *([HANG_UP] if HANG_UP else []))

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            ignored = self.HANG_UP and signal.getsignal(self.HANG_UP) == signal.SIG_IGN  # nohup
            caught = (number for number in self.SIGNALS if not (ignored and number == self.HANG_UP))
            self._before = {number: signal.signal(number, self._stop) for number in caught}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _stop(self, number: int, _: FrameType | None) -> None:
        self.received = number
        for each in self._before:
            signal.signal(each, signal.SIG_IGN if each == self.HANG_UP else signal.SIG_DFL)
        name = signal.Signals(number).name
        say(f"{name}: finishing this step, then saving (once more: stop at once, unsaved).")

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells have it; 0 when there was none."""
        return 128 + self.received if self.received else 0
