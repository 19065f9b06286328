"""Initial values: rows of INITIALIZERS, f(random generator, shape, scale) -> float32 array of that shape.

A ParamSpec names its row and gives `scale`, one number or a tuple of them, whose meaning is the row's own.
NumPy may change what a Generator draws from one version to the next, and `orthogonal` is as exact as LAPACK's QR, whose last bits
differ between builds: values are the same on two machines where NumPy is, and a run records their digest (params.draw).
"""

from collections.abc import Callable

import numpy as np

Scale = float | tuple[float, ...]


def _normal(rng: np.random.Generator, shape: tuple[int, ...], scale: Scale) -> np.ndarray:
    """Normal with standard deviation `scale`."""
    return rng.standard_normal(shape, dtype=np.float32) * np.asarray(scale, np.float32)


def _constant(rng: np.random.Generator, shape: tuple[int, ...], scale: Scale) -> np.ndarray:
    """`scale` everywhere."""
    return np.full(shape, scale, np.float32)


def _uniform(rng: np.random.Generator, shape: tuple[int, ...], scale: Scale) -> np.ndarray:
    """Uniform in +-`scale`."""
    return ((2 * rng.random(shape, dtype=np.float32) - 1) * np.asarray(scale, np.float32)).astype(np.float32)


def _orthogonal(rng: np.random.Generator, shape: tuple[int, ...], scale: Scale) -> np.ndarray:
    """[out, in] with orthogonal columns (rows, where in > out) of length `scale` (rows: sqrt(in / out) times that).

    Its bits depend on the LAPACK that NumPy was built with.
    """
    rows, columns = shape
    q, r = np.linalg.qr(rng.standard_normal((max(shape), min(shape))))
    q = q * np.sign(np.diag(r))  # without it the distribution is not uniform
    return ((q if rows >= columns else q.T) * (max(1.0, columns / rows) ** 0.5 * np.asarray(scale, np.float64))).astype(np.float32)


def _log_of_uniform(rng: np.random.Generator, shape: tuple[int, ...], scale: Scale) -> np.ndarray:
    """log(a), a uniform from scale[0] to scale[1]: the decay rates A of state space models, kept as logarithms."""
    low, high = np.asarray(scale, np.float64)
    return np.log(rng.uniform(low, high, shape)).astype(np.float32)


def _time_step(rng: np.random.Generator, shape: tuple[int, ...], scale: Scale) -> np.ndarray:
    """The b whose softplus is a time step, log-uniform from scale[0] to scale[1] and at least scale[2] (Mamba, 2023)."""
    low, high, floor = np.asarray(scale, np.float64)
    step = np.maximum(np.exp(rng.uniform(np.log(low), np.log(high), shape)), floor)
    return (step + np.log(-np.expm1(-step))).astype(np.float32)


def _rwkv_shift(rng: np.random.Generator, shape: tuple[int, ...], scale: Scale) -> np.ndarray:
    """How much of the token before: 1 - (i / D)^scale in channel i."""
    return (1 - (np.arange(shape[0]) / shape[0]) ** np.asarray(scale, np.float64)).astype(np.float32)


def _rwkv_channels(rng: np.random.Generator, shape: tuple[int, ...], scale: Scale) -> np.ndarray:
    """RWKV-7's ramps over the channels: start + height (i / (D - 1))^power + wave * z |z|, z from -1 to 1 in every head.

    scale: start, height, power, wave, head size.
    """
    start, height, power, wave, head = np.asarray(scale, np.float64)
    channel = np.arange(shape[0])
    z = 2 * (channel % head) / (head - 1) - 1
    return (start + height * (channel / (shape[0] - 1)) ** power + wave * z * np.abs(z)).astype(np.float32)


INITIALIZERS: dict[str, Callable[[np.random.Generator, tuple[int, ...], Scale], np.ndarray]] = {
    "normal": _normal,
    "ones": _constant,
    "zeros": _constant,
    "constant": _constant,
    "uniform": _uniform,
    "orthogonal": _orthogonal,
    "log_of_uniform": _log_of_uniform,
    "time_step": _time_step,
    "rwkv_shift": _rwkv_shift,
    "rwkv_channels": _rwkv_channels,
}
