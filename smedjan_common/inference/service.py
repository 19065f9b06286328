"""The engine in a thread of its own, for programs that answer many at once.

That one thread makes, uses and frees every array: a framework may bind its arrays to the thread that made them (MLX does). Others hand
over requests and get pieces of text through a function of theirs, once an iteration. The queue is bounded: who comes when it is full is
told so at once. However the thread ends, no request is left without a last piece.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from smedjan_common.errors import SmedjanError
from smedjan_common.inference.engine import Engine
from smedjan_common.inference.request import Piece, Request
from smedjan_common.inference.stats import Stats
from smedjan_common.inference.ticket import Ticket, words

Deliver = Callable[[list[Piece]], None]


class QueueFull(SmedjanError):
    """More requests wait already than may."""


class Unavailable(SmedjanError):
    """No request is taken: the service ends, or its thread did."""


class Handle:
    """A request that was taken. `cancel` ends it within two iterations, wherever it is; from any thread, any number of times."""

    def __init__(self, service: "Service", request: Request, deliver: Deliver):
        self.request, self.ticket, self.done, self.cancelled = request, None, False, False
        self._service, self._deliver = service, deliver
        self.arrived = time.monotonic()

    @property
    def waiting(self) -> bool:
        """Whether it has no row yet."""
        return not self.done and (self.ticket is None or not self.ticket.begun)

    def cancel(self) -> None:
        self.cancelled = True
        self._service.wake()

    def give(self, pieces: list[Piece]) -> None:
        """Hand pieces to whoever asked; one who cannot take them is as one who went away."""
        self.done = self.done or pieces[-1].finish_reason is not None
        try:
            self._deliver(pieces)
        except Exception:
            self.cancelled = True

    ticket: Ticket | None


@dataclass(frozen=True)
class Report:
    """How a service stands. seconds_since_step: None while there is nothing to do."""

    running: int
    waiting: int
    rows: int
    alive: bool
    seconds_since_step: float | None
    engine: Stats = field(repr=False)


class Service:
    """open: makes the engine, in the thread. max_queue: how many requests may wait for a row. flush: called after the deliveries of each
    iteration, in the thread; who collects pieces in `deliver` can hand them on at once here."""

    def __init__(self, open: Callable[[], Engine], max_queue: int = 64, flush: Callable[[], None] | None = None):
        self.max_queue, self.error = max_queue, None
        self._open, self._flush = open, flush
        self._changed = threading.Condition()
        self._new: deque[Handle] = deque()  # handed over, not yet seen by the thread
        self._calls: deque[tuple[Callable[[Engine], Any], Future]] = deque()
        self._handles: dict[Ticket, Handle] = {}
        self._engine: Engine | None = None
        self._thread = threading.Thread(target=self._main, name="smedjan-device", daemon=True)
        self._ready: Future[None] = Future()
        self._closing = self._draining = False
        self._stats, self._last = Stats(), 0.0

    error: BaseException | None

    def start(self) -> None:
        """Make the engine and begin to answer; raises what making it raises."""
        self._thread.start()
        self._ready.result()

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive() and self.error is None and not self._closing

    def submit(self, request: Request, deliver: Deliver) -> Handle:
        """Take a request. `deliver` gets its pieces, from the device thread, until one has a finish reason.

        Raises ConfigError for one that cannot be answered, QueueFull, Unavailable.
        """
        return self.submit_all([(request, deliver)])[0]

    def submit_all(self, requests: Sequence[tuple[Request, Deliver]]) -> list[Handle]:
        """Take all of them, or none."""
        assert self._engine is not None, "the service was not started"
        for request, _ in requests:
            request.validate(self._engine.vocab_size)
        with self._changed:
            if not self.alive or self._draining:
                why = words(self.error) or "It is shutting down."
                raise Unavailable("The model takes no requests any more.", why, "Try again later.")
            queued, free = self.waiting, max(self._engine.rows - self._engine.running, 0)
            if queued + len(requests) > self.max_queue + free:
                raise QueueFull("Too many requests wait already.", f"{queued} do, of at most {self.max_queue}.", "Try again in a moment.")
            handles = [Handle(self, request, deliver) for request, deliver in requests]
            self._new += handles
            self._changed.notify()
        return handles

    def call(self, function: Callable[[Engine], Any]) -> Any:
        """What `function` gives for the engine, in the device thread and between its steps."""
        future: Future = Future()
        with self._changed:
            if not self.alive:
                raise Unavailable("The model takes no requests any more.", words(self.error), "Open it again.")
            self._calls.append((function, future))
            self._changed.notify()
        return future.result()

    @property
    def waiting(self) -> int:
        """Requests without a row."""
        engine = self._engine
        return len(self._new) + (engine.waiting if engine else 0)

    def stats(self) -> Report:
        """How it stands, and everything that was counted and measured."""
        engine = self._engine
        running, rows = (engine.running, engine.rows) if engine else (0, 0)
        busy = bool(running or self.waiting)
        return Report(running, self.waiting, rows, self.alive, time.monotonic() - self._last if busy else None, self._stats)

    def drain(self, timeout: float) -> bool:
        """Take no more requests and wait for those that there are; after `timeout` seconds cancel them. Whether all were answered."""
        with self._changed:
            self._draining = True
        whole = self._wait_idle(timeout)
        if not whole:
            for handle in [*self._new, *self._handles.values()]:
                handle.cancel()
            self._wait_idle(5)
        return whole

    def close(self, timeout: float = 10) -> None:
        """End at once: what runs is cancelled, and the thread frees what it made."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def wake(self) -> None:
        """Let the thread look at what changed."""
        with self._changed:
            self._changed.notify()

    def _wait_idle(self, timeout: float) -> bool:
        end = time.monotonic() + timeout
        while self._new or self._handles:
            if time.monotonic() > end or not self._thread.is_alive():
                return not (self._new or self._handles)
            time.sleep(0.01)
        return True

    def _main(self) -> None:
        try:
            engine = self._open()
            self._engine, self._stats = engine, engine.stats
        except BaseException as error:
            self.error = error
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        try:
            while self._iterate(engine):
                pass
        except BaseException as error:
            self.error = error
        finally:
            self._end(engine)

    def _iterate(self, engine: Engine) -> bool:
        """One step, or a wait for something to do; False: the service ends."""
        with self._changed:
            while not (self._closing or self._new or self._calls or engine.busy):
                self._changed.wait()
            if self._closing:
                return False
            new, calls = [*self._new], [*self._calls]
            self._new.clear()
            self._calls.clear()
            for handle in new:
                self._take(engine, handle)
        for function, future in calls:
            _answer(future, function, engine)
        for ticket, handle in self._handles.items():
            if handle.cancelled:
                engine.cancel(ticket)
        if engine.busy:
            self._last = time.monotonic()
            for ticket, piece in engine.step():
                self._handles[ticket].give([piece])
                if piece.finish_reason:
                    del self._handles[ticket]
            if self._flush:
                self._flush()
        return True

    def _take(self, engine: Engine, handle: Handle) -> None:
        try:
            handle.ticket = engine.submit(handle.request, handle.arrived)
            self._handles[handle.ticket] = handle
        except Exception as error:
            handle.give([Piece(finish_reason="error", error=words(error))])

    def _end(self, engine: Engine) -> None:
        """Every request gets its last piece, and every caller an answer, whatever ended the thread."""
        with self._changed:
            self._closing = True
            left, calls = [*self._handles.values(), *self._new], [*self._calls]
            self._handles.clear()
            self._new.clear()
            self._calls.clear()
        reason = "error" if self.error else "cancelled"
        for handle in left:
            usage = handle.ticket.usage if handle.ticket else None
            handle.give([Piece(finish_reason=reason, usage=usage, error=words(self.error))])
        for _, future in calls:
            future.set_exception(Unavailable("The model was closed.", words(self.error), "Open it again."))
        if self._flush and left:
            self._flush()
        engine.close()


def _answer(future: Future, function: Callable[[Engine], Any], engine: Engine) -> None:
    try:
        future.set_result(function(engine))
    except BaseException as error:
        future.set_exception(error)
