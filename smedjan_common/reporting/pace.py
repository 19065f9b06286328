"""How long a run still takes, and what its time went into.

left = steps to come x the median of the last RECENT steps + for evaluations, samples and checkpoints to come what one took so far

Nothing is said before the steps are known: the first ones compile. What was not measured yet counts nothing.
"""

import contextlib
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

RECENT, ENOUGH = 50, 5  # steps whose median counts, and how many there must be


@dataclass
class Pace:
    """steps: of the whole run. cadence: what is done beside steps -> after how many of them; 0: not at all."""

    steps: int
    cadence: Mapping[str, int] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # seconds by what they went into, training aside
    times: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    before: float | None = None  # when the step before was complete; None: something else came between

    def stepped(self, at: float) -> None:
        """A step is complete, at this time of perf_counter."""
        if self.before is not None:
            self.recent.append(at - self.before)
        self.before = at

    @contextlib.contextmanager
    def spending(self, what: str) -> Iterator[None]:
        """A context whose time is no step's."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.spent[what] += time.perf_counter() - begun
            self.times[what] += 1
            self.before = None

    def left(self, step: int) -> float | None:
        """Seconds after `step` to the end of the run; None while that is not known."""
        if len(self.recent) < ENOUGH or step >= self.steps:
            return None
        seconds = (self.steps - step) * statistics.median(self.recent)
        for what, every in self.cadence.items():
            if every and self.times[what]:
                to_come = -(-self.steps // every) - step // every  # the end counts as one
                seconds += to_come * self.spent[what] / self.times[what]
        return seconds
