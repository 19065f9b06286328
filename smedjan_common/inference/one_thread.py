"""A thread in which functions run one after another, for what belongs to one thread.

It ends with its owner, and with the program: a daemon thread alone would be stopped in the middle of a framework's call, a pool's would
be waited for however long its work takes.
"""

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class OneThread:
    """`submit` functions; long ones look at `ending` now and then, and return once it is set."""

    def __init__(self, name: str):
        self.ending = threading.Event()
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=_work, args=(self._tasks,), name=name, daemon=True)
        self._end = weakref.finalize(self, _end, self.ending, self._tasks, self._thread)
        self._thread.start()

    def submit(self, function: Callable[..., Any], *args: Any) -> Future:
        """What the function will give. Raises RuntimeError after `close`."""
        if self.ending.is_set():
            raise RuntimeError("The model was closed.")
        future: Future = Future()
        self._tasks.put((future, function, args))
        return future

    def close(self) -> None:
        """End it, after what was submitted."""
        self._end()


def _work(tasks: queue.SimpleQueue) -> None:
    while (task := tasks.get()) is not None:
        future, function, args = task
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)
        del task, future, function, args  # nothing of it is held while the next one is waited for


def _end(ending: threading.Event, tasks: queue.SimpleQueue, thread: threading.Thread) -> None:
    ending.set()
    tasks.put(None)
    if thread is not threading.current_thread():
        thread.join()
