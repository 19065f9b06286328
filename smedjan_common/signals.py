"""SIGINT and SIGTERM: the first asks the loop to finish its step and save, a second one ends the process at once."""

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

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = {number: signal.signal(number, self._stop) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _stop(self, number: int, _: FrameType | None) -> None:
        self.received = number
        for each in self.SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        name = signal.Signals(number).name
        say(f"{name}: finishing this step, then saving (once more: stop at once, unsaved).")

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells have it; 0 when there was none."""
        return 128 + self.received if self.received else 0
