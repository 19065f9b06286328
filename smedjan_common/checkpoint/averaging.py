"""Several models of one shape made into one, tensor by tensor in float64: rows of METHODS.

    linear   sum w_i W_i / sum w_i
    slerp    sin((1 - t) a) / sin a W_1 + sin(t a) / sin a W_2      a: the angle between the two tensors, flattened
             (Shoemake, 1985); where |cos a| > 0.9995 the straight line between them
    ties     base + scale sum' w_i d_i / sum' w_i                   d_i = W_i - base, all but its largest |values| set to 0;
             the sums at each place over those d_i alone whose w_i d_i has the sign of sum w_i d_i there (Yadav et al., 2023)

Each tensor is its own vector, as in mergekit, whose conventions these are: slerp turns tensors as long as they are, ties counts a sum of 0
as positive and leaves out zeros. A method reads its
tensors as often as it needs them and holds a few at once, however many models there are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from smedjan_common.checkpoint.lazy import Lazy
from smedjan_common.errors import NotFiniteError

STRAIGHT = 0.9995  # the |cosine| from which on slerp is the straight line
Read = Callable[[], np.ndarray]  # -> a tensor, float64


class Settings(NamedTuple):
    """weights: one of each model (linear, ties). t: how far from the first model to the second (slerp). density: the part of a difference
    that is kept; scale: what the sum of differences is multiplied by (ties)."""

    weights: tuple[float, ...]
    t: float = 0.5
    density: float = 0.5
    scale: float = 1.0


@dataclass(frozen=True)
class Method:
    """A way to merge. merge(tensors, base, settings) -> float64; `base` is None where `needs_base` is not. reads: the settings that it
    takes. models: how many, where it takes no other number."""

    name: str
    about: str
    merge: Callable[[Sequence[Read], Read | None, Settings], np.ndarray]
    reads: tuple[str, ...]
    needs_base: bool = False
    models: int | None = None


def linear(tensors: Sequence[Read], base: Read | None, settings: Settings) -> np.ndarray:
    """The weighted mean."""
    total: Any = 0.0
    for read, weight in zip(tensors, settings.weights, strict=True):
        total = total + weight * read()
    return total / sum(settings.weights)


def slerp(tensors: Sequence[Read], base: Read | None, settings: Settings) -> np.ndarray:
    """On the arc from one tensor to the other."""
    (one, other), t = (read() for read in tensors), settings.t
    cosine = float(np.clip(np.vdot(_direction(one), _direction(other)), -1, 1))
    if abs(cosine) > STRAIGHT:
        return (1 - t) * one + t * other
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * one + np.sin(t * angle) * other) / np.sin(angle)


def _direction(tensor: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(tensor)
    return tensor / norm if norm > 1e-8 else tensor  # mergekit's bound


def ties(tensors: Sequence[Read], base: Read | None, settings: Settings) -> np.ndarray:
    """The base, moved by what the models agree on. Differences are made twice, so that two of them are held at once, not all."""
    assert base is not None
    start, signs = base(), np.zeros(1)
    for read, weight in zip(tensors, settings.weights, strict=True):
        signs = signs + weight * trimmed(read() - start, settings.density)
    elected, total, shares = np.where(signs >= 0, 1.0, -1.0), np.zeros_like(start), np.zeros_like(start)
    for read, weight in zip(tensors, settings.weights, strict=True):
        moved = weight * trimmed(read() - start, settings.density)
        agrees = np.sign(moved) == elected
        total[agrees] += moved[agrees]
        shares[agrees] += weight
    shares[shares == 0] = 1
    return start + settings.scale * total / shares


def trimmed(delta: np.ndarray, density: float) -> np.ndarray:
    """`delta` with the part `density` of its values that are largest by magnitude, one at least; the others are 0. Of equal ones at the
    border the first stay."""
    keep = max(1, int(density * delta.size))
    if keep >= delta.size:
        return delta
    sizes = np.abs(delta).reshape(-1)
    border = np.partition(sizes, delta.size - keep)[delta.size - keep]
    stays = sizes > border
    stays[np.flatnonzero(sizes == border)[: keep - int(stays.sum())]] = True
    return np.where(stays.reshape(delta.shape), delta, 0.0)


METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method("linear", "weighted mean", linear, ("weights",)),
        Method("slerp", "on the arc from one model to another", slerp, ("t",), models=2),
        Method("ties", "a base moved by what several models agree on", ties, ("weights", "density", "scale", "base"), needs_base=True),
    )
}


def merged(
    method: Method, settings: Settings, models: Sequence[Mapping[str, Lazy]], base: Mapping[str, Lazy] | None = None
) -> dict[str, Lazy]:
    """The tensors of the merged model, float32, each computed when its turn comes. Reading raises NotFiniteError."""

    def one(name: str) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            made = method.merge([_float64(model[name]) for model in models], _float64(base[name]) if base else None, settings)
            cast = made.astype(np.float32)
        if not np.isfinite(cast).all():
            why = "A value of a model is not finite, or the sum is larger than float32 holds."
            raise NotFiniteError(f"{name} of the merged model is not finite.", why, "Merge other models, or with other weights.")
        return cast

    return {name: Lazy(np.dtype(np.float32), tensor.shape, partial(one, name)) for name, tensor in models[0].items()}


def _float64(tensor: Lazy) -> Read:
    return lambda: np.asarray(tensor.read(), np.float64)
