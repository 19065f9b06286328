"""A piece of a backend by itself: what a function of arrays gives, and its gradients. The oracle tests of mixers use it."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.conformance.subjects import Params, framework, on_device, on_host


def value_and_gradients(
    backend: str, function: Callable[[Any], Sequence[Any]], host: Params, weights: Sequence[np.ndarray]
) -> tuple[list[np.ndarray], Params]:
    """What `function` of a dict of arrays gives, and the gradients of the sum of that weighted by `weights`."""
    side = framework(backend)
    weights = [side.array(weight) for weight in weights]

    def weighted(arrays: Any) -> Any:
        return sum((out * weight).sum() for out, weight in zip(function(arrays), weights, strict=True))

    outputs, grads = side.compile(lambda arrays: (function(arrays), side.grad(weighted)(arrays)))(on_device(backend, host))
    return [np.asarray(out) for out in outputs], on_host(grads)
