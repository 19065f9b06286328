"""Work spread over processes that start clean: `python -m smedjan_common.workers`, pickled messages over pipes.

Not multiprocessing: nothing is forked (safe beside threads and GPUs) and the caller's script is not run again (no __main__ guard
needed). A worker object is made in each process from "module:Class" and arguments; `map` calls it on items and gives the results in
order; `finish` collects what each has gathered. With one worker everything happens in this process.

A process that ends before it has answered (the system takes the largest one where memory runs out) is a WorkerError that names the
signal or exit code, whether it is met while a message is sent or while the answer is awaited.
"""

import importlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from smedjan_common import errors

_PACKAGE_PARENT = str(Path(__file__).resolve().parents[1])
_IN_FLIGHT = 2  # items per worker that are under way or waiting
_ENOUGH_BYTES = 4 << 20  # of text; below it starting processes takes longer than the work
_PATIENCE_SECONDS = 10  # for a process that closed its pipe to end


class Pool:
    """Workers of whichever executor (executors.py): `with start(…) as workers:`; then `map` and `finish`."""

    count = 1

    def map(self, items: Iterable[Any]) -> Iterator[Any]:
        """Results in the order of the items; only a few items are read ahead. Raises what the worker raised."""
        with ThreadPoolExecutor(self.count) as threads:
            waiting: deque = deque()
            try:
                for item in items:
                    waiting.append(threads.submit(self._ask, item))
                    if len(waiting) > _IN_FLIGHT * self.count:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            except BaseException:
                self.close()  # unblocks the threads
                raise

    def _ask(self, item: Any) -> Any:
        raise NotImplementedError

    def finish(self) -> list[Any]:
        """What the workers' `finish()` return, one for each or several together."""
        raise NotImplementedError

    def close(self) -> None:
        """End all of them."""
        raise NotImplementedError

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Workers(Pool):
    """Processes of this machine: `with Workers("module:Class", args, count) as workers:`."""

    def __init__(self, target: str, args: tuple, count: int):
        self.count = max(1, count)
        self._local = make(target, args) if self.count == 1 else None
        self._processes: list[subprocess.Popen] = []
        self._free: queue.Queue[subprocess.Popen] = queue.Queue()
        if self._local is None:
            try:
                self._start(target, args)
            except BaseException:
                self.close()
                raise

    def _start(self, target: str, args: tuple) -> None:
        paths = [_PACKAGE_PARENT, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        for _ in range(self.count):
            command = [sys.executable, "-m", "smedjan_common.workers"]
            self._processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment))
        for process in self._processes:
            _send(process, (target, args))
            self._free.put(process)

    def map(self, items: Iterable[Any]) -> Iterator[Any]:
        """As Pool has it; one worker is this process."""
        yield from super().map(items) if self._local is None else map(self._local, items)

    def _ask(self, item: Any) -> Any:
        process = self._free.get()
        try:
            _send(process, ("item", item))
            return _receive(process)
        finally:
            self._free.put(process)

    def finish(self) -> list[Any]:
        """What each worker's `finish()` returns."""
        if self._local is not None:
            return [self._local.finish()]
        for process in self._processes:
            _send(process, ("finish", None))
        return [_receive(process) for process in self._processes]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()

    def __exit__(self, *_: object) -> None:
        self.close()
        for process in self._processes:
            for pipe in (process.stdin, process.stdout):
                _close_quietly(pipe)


def processes(asked: int | None, size: int, enough: int = _ENOUGH_BYTES) -> int:
    """How many processes work on `size` bytes: as many as were `asked` for, else all cores where that is worth starting them.

    Raises ConfigError for fewer than one.
    """
    if asked is None:
        return default_workers() if size >= enough else 1
    if asked < 1:
        raise errors.ConfigError(
            f"--workers is {asked}.", "At least one process is needed.", "Give at least 1, or leave it out for all cores."
        )
    return asked


def default_workers() -> int:
    """As many processes as this one may use cores."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def make(target: str, args: tuple) -> Any:
    """A worker of this "module:Class"."""
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)(*args)


def _write(pipe: IO[bytes], message: Any) -> None:
    pickle.dump(message, pipe, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.flush()


def _send(process: subprocess.Popen, message: Any) -> None:
    assert process.stdin is not None
    try:
        _write(process.stdin, message)
    except BrokenPipeError:
        raise _ended(process) from None


def _receive(process: subprocess.Popen) -> Any:
    assert process.stdout is not None
    try:
        reply = pickle.load(process.stdout)
    except (EOFError, pickle.UnpicklingError):
        raise _ended(process) from None
    return result(reply)


def result(reply: tuple[str, Any]) -> Any:
    """What `answer` has of a worker, or raises what it raised."""
    kind, value = reply
    if kind == "refused":
        name, sentences, case = value
        raise getattr(errors, name)(*sentences, case=case)
    if kind == "out of memory":
        raise errors.OutOfMemoryError("A worker process ran out of memory.", value, _FEWER)
    if kind == "failed":
        raise RuntimeError(f"A worker process failed:\n{value}")
    return value


def _ended(process: subprocess.Popen) -> errors.WorkerError:
    """The error for a process that closed its pipes."""
    try:
        code = process.wait(_PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        return errors.WorkerError("A worker process does not answer.", f"Process {process.pid} has closed its pipes.", "Try again.")
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        why = "The system does this to the largest process when memory runs out." if -code == signal.SIGKILL else ""
        return errors.WorkerError(f"A worker process was ended by {name}.", why, _FEWER)
    return errors.WorkerError(f"A worker process ended early, with exit code {code}.", "See what it printed above.", _FEWER)


_FEWER = "Close other programs, or take fewer --workers; for smedjan train, in smedjan prepare."


def _close_quietly(pipe: IO[bytes] | None) -> None:
    try:
        if pipe:
            pipe.close()
    except OSError:
        pass


def _serve() -> None:
    """The worker's side: read messages until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    source, out = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints goes to standard error, not into the messages
    worker = make(*pickle.load(source))
    while True:
        try:
            kind, item = pickle.load(source)
        except EOFError:
            return
        try:
            _write(out, answer(worker, kind, item))
        except BrokenPipeError:
            return


def answer(worker: Any, kind: str, item: Any) -> tuple[str, Any]:
    """What a worker gives to an "item", or to "finish", as it goes back: it may be an error."""
    try:
        return "result", worker(item) if kind == "item" else worker.finish()
    except errors.SmedjanError as error:
        return "refused", (type(error).__name__, (error.what, error.why, error.fix), error.case)
    except MemoryError as error:
        return "out of memory", f"{error}." if str(error) else ""
    except Exception:
        return "failed", traceback.format_exc()


if __name__ == "__main__":
    _serve()
