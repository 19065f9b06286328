"""Signals while lines are read: seen at once, and those that end the program leave the terminal as it was."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

_WAKING = signal.SIGURG  # nothing else sends it here, and its default is to be ignored
_MOMENTS = (0.05, 0.2, 1.0)  # seconds after a signal at which a wait that began just after it is ended


@contextlib.contextmanager
def signals_leave() -> Iterator[None]:
    """A context in which SIGTERM and SIGHUP end the program by way of Python: only so readline gives the terminal back as it was."""

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        with _seen_at_once():
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _seen_at_once() -> Iterator[None]:
    """A context in which no signal waits for the next key.

    Python notes a signal and acts on it between two of its own instructions; CPython's readline looks for one only where its wait for a
    key is cut short. One that comes just before that wait would be seen at the next key. So a thread is told of every signal and cuts
    the wait short a moment later, with a signal that does nothing.
    """
    told, tells = os.pipe()
    os.set_blocking(tells, False)
    before = signal.signal(_WAKING, lambda *_: None)
    wakeup = signal.set_wakeup_fd(tells, warn_on_full_buffer=False)
    main = threading.get_ident()

    def wake() -> None:
        with open(told, "rb", buffering=0) as numbers:
            while came := numbers.read(64):
                for moment in _MOMENTS if set(came) != {_WAKING} else ():
                    time.sleep(moment)
                    signal.pthread_kill(main, _WAKING)

    threading.Thread(target=wake, name="signals", daemon=True).start()  # ends when nothing can tell it more
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(_WAKING, before)
        os.close(tells)
