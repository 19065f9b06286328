"""Initial values: rows of INITIALIZERS, f(random generator, shape, scale) -> float32 array of that shape.

A ParamSpec names its row and gives `scale`, one number or a tuple of them, whose meaning is the row's own.
"""

from collections.abc import Callable

import numpy as np

Scale = float | tuple[float, ...]


def _normal(rng: np.random.Generator, shape: tuple[int, ...], scale: Scale) -> np.ndarray:
    """Normal with standard deviation `scale`."""
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)


def _constant(rng: np.random.Generator, shape: tuple[int, ...], scale: Scale) -> np.ndarray:
    """`scale` everywhere."""
    return np.full(shape, scale, np.float32)


INITIALIZERS: dict[str, Callable[[np.random.Generator, tuple[int, ...], Scale], np.ndarray]] = {
    "normal": _normal,
    "ones": _constant,
}
