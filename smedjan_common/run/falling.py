"""Tells, once, when learning from pairs makes the better answers themselves less probable.

A loss of pairs sees only how far the better answer is ahead, which grows as well where both fall and the worse one falls faster: a low
loss, and a model that says neither. With a reference the fall is exact, batch by batch; without one it is that of the mean of a window of
steps against the first window.
"""

from collections import deque
from typing import Any

from smedjan_common.training.config import TrainConfig
from smedjan_common.training.preferences import PREFERENCES

WINDOW = 10  # steps
WORSE = 0.02  # of the log-probability, from where it is told; windows without a reference hold other pairs, and differ by themselves
WORSE_BY_WINDOWS = 0.1


class Falling:
    """`add` each step's figures. compared: whether a reference gives the answers log-probabilities too."""

    def __init__(self, train: TrainConfig, compared: bool):
        self._of_pairs, self._compared, self._beta = train.objective in PREFERENCES, compared, train.beta
        self._window: deque[tuple[float, float]] = deque(maxlen=WINDOW)  # (log-probability of the better answers, what it was)
        self._first: float | None = None
        self._told = False

    def add(self, values: dict[str, Any]) -> str | None:
        """What there is to tell after this step."""
        if not self._of_pairs or self._told:
            return None
        if self._compared:
            now, unit = values["logps/chosen"], "an answer"
            before = now - values["rewards/chosen"] / self._beta
        else:
            now, unit, before = values["logps/chosen_per_token"], "a token", self._first or 0.0
        self._window.append((now, before))
        if len(self._window) < WINDOW:
            return None
        now, before = (sum(part) / WINDOW for part in zip(*self._window, strict=True))
        if not self._compared and self._first is None:
            self._first = now
            self._window.clear()
            return None
        if now - before > before * (WORSE if self._compared else WORSE_BY_WINDOWS):
            return None
        self._told = True
        return (
            f"note: the better answers have become less probable: log p {before:.2f} -> {now:.2f} {unit}, the mean of {WINDOW} steps."
            " The loss sees only how far they are ahead of the worse ones, so both may fall."
            " Read samples; where they get worse, lower --lr, raise --beta, or add --nll-weight 0.2. This is said once."
        )
