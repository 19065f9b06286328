"""The speed of training, measured between log rows; compilation, evaluation, samples and checkpoints do not count."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class Meter:
    """Tokens per second of training alone: the interval since the last log row, pauses taken out."""

    tokens_per_step: int
    step: int | None = None  # where the interval began; None: nothing is measured yet
    since: float = 0.0

    def start(self, step: int) -> None:
        """Begin an interval at `step`."""
        self.step, self.since = step, time.perf_counter()

    def lap(self, step: int) -> float | None:
        """Tokens per second up to `step`, and a new interval from there."""
        begun, seconds = self.step, time.perf_counter() - self.since
        self.start(step)
        return (step - begun) * self.tokens_per_step / seconds if begun is not None and step > begun and seconds > 0 else None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time does not count."""
        before = time.perf_counter()
        yield
        self.since += time.perf_counter() - before
