"""The mean loss between two lines, and the speed of training: measured from where one logged step is complete to where the next one is;
compilation, evaluation, samples and checkpoints do not count.

A step is read after the next one was dispatched. Where dispatching only queues it, it is complete when it is read. MLX on a CPU computes
while it dispatches: there a step is complete when its own dispatching ends, and by the time it is read so is the one after it, which at
the end of a run would seem to take no time.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple


class Span(NamedTuple):
    """When something was begun and ended, by time.perf_counter."""

    begun: float
    ended: float

    @property
    def seconds(self) -> float:
        return self.ended - self.begun


@dataclass
class RunningMean:
    """The mean of a figure over the steps since the last line. It travels in checkpoints, so that a run that was stopped between two lines
    goes on to the same bits."""

    total: float = 0.0
    steps: int = 0

    @classmethod
    def of(cls, state: Any) -> "RunningMean":
        """What `to_json` gave; nothing yet where a checkpoint has none."""
        fits = isinstance(state, dict) and type(state.get("total")) is float and type(state.get("steps")) is int and state["steps"] >= 0
        return cls(state["total"], state["steps"]) if fits else cls()

    def to_json(self) -> dict[str, Any]:
        """As a checkpoint holds it."""
        return {"total": self.total, "steps": self.steps}

    def add(self, value: float) -> float:
        """One more step; returns the mean up to it."""
        self.total += value
        self.steps += 1
        return self.total / self.steps

    def clear(self) -> None:
        """A line was written: the next mean begins."""
        self.total, self.steps = 0.0, 0


def timed(function: Callable[..., Any], *args: Any) -> tuple[Any, Span]:
    """What the function returns, and when it was called."""
    begun = time.perf_counter()
    value = function(*args)
    return value, Span(begun, time.perf_counter())


@dataclass
class Meter:
    """Tokens per second of training alone: the interval since the last logged step, pauses taken out."""

    tokens_per_step: int
    step: int | None = None  # where the interval began; None: nothing is measured yet
    since: float = 0.0

    def start(self, step: int, at: float | None = None) -> None:
        """Begin an interval at `step`, now or at that time."""
        self.step, self.since = step, time.perf_counter() if at is None else at

    def lap(self, step: int, dispatched: Span, read: Span) -> float | None:
        """Tokens per second up to `step`, and a new interval from there."""
        computed = dispatched.seconds > read.seconds and dispatched.ended > self.since
        complete = dispatched.ended if computed else read.ended
        begun, seconds = self.step, complete - self.since
        self.start(step, complete)
        return (step - begun) * self.tokens_per_step / seconds if begun is not None and step > begun and seconds > 0 else None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time does not count."""
        before = time.perf_counter()
        yield
        self.since += time.perf_counter() - before
