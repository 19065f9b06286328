"""How often a run is evaluated, sampled and saved: as the flags say, else a few times whatever its length."""

from math import ceil
from typing import NamedTuple


class Cadence(NamedTuple):
    """times: how often in a run, its end among them. most: steps between two at most; 0: any number."""

    times: int
    most: int = 0


CADENCES = {
    "eval_every": Cadence(10),
    "sample_every": Cadence(5),
    "checkpoint_every": Cadence(10, 1000),  # what a machine that fails takes with it
}


def interval(name: str, given: int | None, steps: int) -> int:
    """Steps between two: what is given (0: never, or only at the end), else of the run's `steps` a part."""
    if given is not None:
        return given
    times, most = CADENCES[name]
    return max(1, min(ceil(steps / times), most or steps))
