"""Learning-rate schedules: closed forms of (config, step), shared by both backends.

Step s (from 0) trains with lr(s). Warm-up rises linearly: lr * (s + 1) / warmup for s < warmup. Then, with
p = (s - warmup) / (steps - warmup) and floor f = min_lr_ratio:

    cosine     f + (1 - f) (1 + cos(pi p)) / 2             (Loshchilov & Hutter, 2017)
    linear     1 - (1 - f) p
    wsd        1 until the last decay_fraction of the run, then linear to f        (MiniCPM, 2024)
    invsqrt    sqrt(w / (w + s - warmup)), at least f;  w = max(1, warmup)         (Vaswani et al., 2017)
    constant   1

After warm-up a rate is never outside [f lr, lr], whatever floating point makes of these forms; in warm-up never above lr.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from smedjan_common.model.options import option


@dataclass(frozen=True)
class Floor:
    """Options of schedules that end above 0."""

    min_lr_ratio: float = option(0.1, "Last learning rate over the peak.", least=0, most=1)


@dataclass(frozen=True)
class Decay(Floor):
    """Options of `wsd`."""

    decay_fraction: float = option(0.2, "The part of the run in which wsd decays.", least=0, most=1)


class Course(Protocol):
    """What a schedule reads of a run: TrainConfig has it."""

    @property
    def steps(self) -> int: ...
    @property
    def warmup(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def lr_schedule(self) -> str: ...
    @property
    def min_lr_ratio(self) -> float: ...
    @property
    def decay_fraction(self) -> float: ...


def learning_rate(config: Course, step: int) -> float:
    """Learning rate of optimizer step `step` (from 0). Past the last step it stays at the last value."""
    if step < config.warmup:
        return min(config.lr, config.lr * (step + 1) / config.warmup)
    span = max(1, config.steps - config.warmup)
    progress = min(1.0, (step - config.warmup) / span)
    # rounding takes a form out of its range: wsd's last rate was -9e-16 of the peak where the decay is a thousandth of one step
    factor = SCHEDULES[config.lr_schedule].factor(config, progress)
    return config.lr * min(1.0, max(config.min_lr_ratio, factor))


def _cosine(config: Course, progress: float) -> float:
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2


def _linear(config: Course, progress: float) -> float:
    return 1 - (1 - config.min_lr_ratio) * progress


def _wsd(config: Course, progress: float) -> float:
    span = max(1, config.steps - config.warmup)
    decay = min(1.0, config.decay_fraction * config.steps / span)
    into_decay = (progress - (1 - decay)) / decay if decay > 0 else 0.0
    return 1 - (1 - config.min_lr_ratio) * max(0.0, into_decay)


def _invsqrt(config: Course, progress: float) -> float:
    width, since_warmup = max(1, config.warmup), progress * max(1, config.steps - config.warmup)
    return max(config.min_lr_ratio, math.sqrt(width / (width + since_warmup)))


def _constant(config: Course, progress: float) -> float:
    return 1.0


class ScheduleSpec(NamedTuple):
    """A schedule. factor(config, progress) -> the rate over the peak, progress from 0 to 1 after the warm-up. options: what it reads."""

    name: str
    options: type | None
    factor: Callable[[Course, float], float]


SCHEDULES: dict[str, ScheduleSpec] = {
    row.name: row
    for row in (
        ScheduleSpec("cosine", Floor, _cosine),
        ScheduleSpec("linear", Floor, _linear),
        ScheduleSpec("wsd", Decay, _wsd),
        ScheduleSpec("invsqrt", Floor, _invsqrt),
        ScheduleSpec("constant", None, _constant),
    )
}
