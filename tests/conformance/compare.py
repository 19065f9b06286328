"""Comparison that names the tensor and the numbers: differences are measured first, then demanded to lie under their gates."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Difference(NamedTuple):
    """`value` is how far `name` is off, relative; it conforms when value <= gate."""

    name: str
    value: float
    gate: float


class Mismatch(AssertionError):
    """Two sides that should agree do not."""


def demand(differences: Iterable[Difference]) -> float:
    """Raises Mismatch naming every difference over its gate (a NaN is over every gate), worst first; returns the largest."""
    differences = list(differences)
    assert differences, "nothing was compared"
    over = [d for d in differences if not d.value <= d.gate]
    if over:
        over.sort(key=lambda d: d.value / d.gate if d.value == d.value else np.inf, reverse=True)
        lines = [f"{d.name}: {d.value:.3g}, the gate is {d.gate:.3g}" for d in over]
        raise Mismatch(f"{len(over)} of {len(differences)} over the gate:\n  " + "\n  ".join(lines[:12]))
    return max(d.value for d in differences)


def largest(got: np.ndarray, want: np.ndarray) -> float:
    """max |got - want| / max |want|."""
    got, want = _pair(got, want)
    return float(np.abs(got - want).max() / (np.abs(want).max() or 1.0))


def relative_l2(got: np.ndarray, want: np.ndarray) -> float:
    """||got - want|| / ||want||."""
    got, want = _pair(got, want)
    return float(np.linalg.norm(got - want) / (np.linalg.norm(want) or 1.0))


def tensors(got: dict[str, np.ndarray], want: dict[str, np.ndarray], gate: float, label: str = "") -> list[Difference]:
    """Relative L2 of every tensor; the names must be the same."""
    if set(got) != set(want):
        raise Mismatch(f"{label}names differ: {sorted(set(got) ^ set(want))}")
    return [Difference(label + name, relative_l2(got[name], want[name]), gate) for name in want]


def demand_equal_bits(got: dict[str, np.ndarray], want: dict[str, np.ndarray], label: str = "") -> None:
    """Raises Mismatch naming the tensors whose bits differ."""
    if set(got) != set(want):
        raise Mismatch(f"{label}names differ: {sorted(set(got) ^ set(want))}")
    wrong = [name for name in want if not same_bits(got[name], want[name])]
    if wrong:
        worst = {name: largest(got[name], want[name]) for name in wrong if np.shape(got[name]) == np.shape(want[name])}
        raise Mismatch(f"{label}{len(wrong)} of {len(want)} tensors differ in bits: {wrong[:8]}; largest relative difference {worst}")


def same_bits(got: np.ndarray, want: np.ndarray) -> bool:
    """Same dtype, shape and bytes."""
    got, want = np.asarray(got), np.asarray(want)
    return got.dtype == want.dtype and got.shape == want.shape and got.tobytes() == want.tobytes()


def _pair(got: np.ndarray, want: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        raise Mismatch(f"shapes differ: {got.shape} and {want.shape}")
    return got, want
