"""A run as curves: what its rows are over steps, tokens, FLOPs or time; smoothing; where y begins and ends. Plain lists of floats."""

from bisect import bisect_right
from dataclasses import dataclass, field

from smedjan_common.reporting.metrics import Row, eval_rows, event_rows, train_rows

AXES = {"steps": "step", "tokens": "tokens", "flops": "FLOPs", "time": "seconds of the run"}
SMOOTH = 0.05  # of a curve, in the line around each of its points


@dataclass
class Curve:
    """A run of one label. flops_per_token: None where the model is not known."""

    rows: list[Row]
    flops_per_token: float | None = None
    trained: list[Row] = field(init=False)
    checks: list[Row] = field(init=False)
    events: list[Row] = field(init=False)

    def __post_init__(self) -> None:
        self.trained, self.checks, self.events = train_rows(self.rows), eval_rows(self.rows), event_rows(self.rows)

    def has(self, axis: str) -> bool:
        """Whether it can be drawn over that axis."""
        return axis != "flops" or self.flops_per_token is not None

    def xs(self, rows: list[Row], axis: str) -> list[float]:
        """Where rows stand on an axis of AXES; those of evaluations and events between the rows of steps."""
        if axis == "steps":
            return [row["step"] for row in rows]
        per_token = (self.flops_per_token or 0.0) if axis == "flops" else 1
        key = "elapsed_seconds" if axis == "time" else "tokens"
        steps = [0, *(row["step"] for row in self.trained)]
        known = [0.0, *((row.get(key) or 0.0) * per_token for row in self.trained)]
        return [_between(steps, known, row["step"]) for row in rows]

    def series(self, key: str, axis: str) -> tuple[list[float], list[float]]:
        """x and y of a figure of training, where it is known."""
        rows = [row for row in self.trained if row.get(key) is not None]
        return self.xs(rows, axis), [row[key] for row in rows]


def _between(steps: list[int], known: list[float], step: int) -> float:
    at = bisect_right(steps, step) - 1
    if at + 1 >= len(steps):  # past the last row: as fast as before
        begin = max(0, at - 1)
        slope = (known[at] - known[begin]) / (steps[at] - steps[begin]) if at > begin else 0.0
        return known[at] + (step - steps[at]) * slope
    return known[at] + (known[at + 1] - known[at]) * (step - steps[at]) / (steps[at + 1] - steps[at])


def smoothed(values: list[float], share: float = SMOOTH) -> list[float]:
    """Each value by the straight line through its neighbours: `share` of the curve, fewer at its begin, where it falls
    fast, and only those before it at its end."""
    half = max(1, int(len(values) * share / 2))
    sums, moments = [0.0], [0.0]
    for at, value in enumerate(values):
        sums.append(sums[-1] + value)
        moments.append(moments[-1] + at * value)
    found = []
    for at in range(len(values)):
        reach = min(half, at)
        begin, end = at - reach, min(len(values), at + reach + 1)
        count, middle = end - begin, (begin + end - 1) / 2
        mean = (sums[end] - sums[begin]) / count
        spread = count * (count * count - 1) / 12
        slope = (moments[end] - moments[begin] - middle * count * mean) / spread if spread else 0.0
        found.append(mean + slope * (at - middle))
    return found


def limits(values: list[float], always: list[float], most: float) -> tuple[float, float] | None:
    """From where to where y goes: all of `always`, and of the values the lower `most`, so that the first steps do not flatten the rest."""
    if not values and not always:
        return None
    ordered = sorted(values)
    low = min(ordered[:1] + always)
    high = max([quantile(ordered, most)] * bool(ordered) + always)
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin


def quantile(ordered: list[float], share: float) -> float:
    """The value under which that share of the ordered values is."""
    place = share * (len(ordered) - 1)
    at = int(place)
    after = ordered[min(at + 1, len(ordered) - 1)]
    return ordered[at] + (after - ordered[at]) * (place - at)


def apart(places: list[float], least: float) -> list[float]:
    """Places for labels that want to be at `places`, in the same order and at least `least` apart, moved as little as a sweep does."""
    order = sorted(range(len(places)), key=lambda at: places[at])
    found = sorted(places)
    for _ in range(50):
        for one in range(len(found) - 1):
            short = least - (found[one + 1] - found[one])
            if short > 1e-12:
                found[one] -= short / 2
                found[one + 1] += short / 2
    result = [0.0] * len(places)
    for at, place in zip(order, found, strict=True):
        result[at] = place
    return result
