"""SIGINT, SIGTERM, SIGHUP: the first asks the loop to finish its step and save, a second one ends the process at once.

The handler notes the number and nothing else: it runs between any two instructions of the main thread, in the middle of a print too.
Python's own C handler also writes the number into a pipe, at once, even while the main thread waits inside a framework. A thread reads
it: it says what happens, if that is possible without waiting (the loop says it else), and ends the process at a second signal.

SIGHUP comes when the terminal is closed, and often twice: from the kernel and from the shell. So it never is the second one.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from smedjan_common.reporting.console import say
from smedjan_common.streams import put_now

NEXT_LINE = "\n"


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

    lost: says, in whole sentences, what a process that ended now would lose. announce: says a line at once if that is possible without
    waiting, and whether it did. Both are called in another thread. drawn: whether a display is under the lines. asked: whether
    somebody asked how far the run is (Ctrl-T on macOS, SIGUSR1), for the loop to answer.
    """

    HANG_UP = signal.SIGHUP
    SIGNALS = (signal.SIGINT, signal.SIGTERM, HANG_UP)
    QUESTIONS = tuple(getattr(signal, name) for name in ("SIGINFO", "SIGUSR1") if hasattr(signal, name))

    def __init__(self, lost: Callable[[], str] = lambda: "") -> None:
        self.received, self.asked, self.drawn = 0, False, False
        self.lost = lost
        self.announce: Callable[[str], bool] = lambda line: put_now(line, sys.stdout)
        self._before: dict[int, object] = {}
        self._silent = threading.Semaphore(1)  # taken by who says what the first signal does

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is not threading.main_thread():  # Python allows handlers nowhere else
            return self
        reader, self._pipe = os.pipe()
        os.set_blocking(self._pipe, False)
        self._pipe_before = signal.set_wakeup_fd(self._pipe, warn_on_full_buffer=False)
        ignored = signal.getsignal(self.HANG_UP) == signal.SIG_IGN  # nohup
        caught = (number for number in self.SIGNALS if not (ignored and number == self.HANG_UP))
        self._before = {number: signal.signal(number, self._note) for number in caught}
        self._questions = {number: signal.signal(number, self._ask) for number in self.QUESTIONS}
        self._watcher = threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._before:
            return
        for number, handler in (self._before | self._questions).items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._pipe_before)
        os.close(self._pipe)  # the watcher's end
        self._watcher.join()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or number

    def _ask(self, number: int, _: FrameType | None) -> None:
        self.asked = True

    def _watch(self, reader: int) -> None:
        first = 0
        with open(reader, "rb", buffering=0) as numbers:
            while byte := numbers.read(1):
                number = byte[0]
                if number not in self._before or (first and number == self.HANG_UP):
                    continue
                if first:
                    put_now(f"{self.drawn * NEXT_LINE}{signal.Signals(number).name} again: stopped at once. {self.lost()}", sys.stderr)
                    os._exit(128 + number)
                first = number
                if self._silent.acquire(blocking=False) and not self.announce(_notice(number)):
                    self._silent.release()

    def speak(self) -> None:
        """Say what the first signal does, unless that has been said; for the loop, when it has seen one."""
        if self.received and self._silent.acquire(blocking=False):
            say(_notice(self.received))

    @property
    def by(self) -> str:
        """` by SIGINT`, where a signal came."""
        return f" by {signal.Signals(self.received).name}" if self.received else ""

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells have it; 0 when there was none."""
        return 128 + self.received if self.received else 0


def _notice(number: int) -> str:
    return f"{signal.Signals(number).name}: finishing this step, then saving (once more: stop at once, unsaved)."
