"""Directional derivatives of a float64 function of the parameters: what every gradient is checked against.

    d/dh f(p + h d) at 0  =  (f(-2h) - 8 f(-h) + 8 f(h) - f(2h)) / 12h  +  h^4 f^(5) / 30

Step size. `step` counts in units of the tensor's own size (its root mean square), so that it means the same for a norm's
weight near 1 and a projection near 0.02. At 1e-3 the truncation is about 1e-12 f^(5) / 30. The rounding of f (a few
1e-16 of a loss near 4) over 12h is about 1e-12 of a derivative per relative change, which for the smallest tensors of
the suite is near 1e-3: 1e-9 relative. Both lie far below the gate of 1e-5; test_reference.py measures that halving the
step changes nothing above 1e-8.
"""

from collections.abc import Callable

import numpy as np

Params = dict[str, np.ndarray]
STEP = 1e-3


def directional_derivative(
    function: Callable[[Params], float], params: Params, name: str, direction: np.ndarray, step: float = STEP
) -> float:
    """Derivative of `function(params)` when `params[name]` moves along `direction` (of its shape, any length)."""
    value = np.asarray(params[name], np.float64)
    size = np.sqrt(np.mean(value * value)) / np.sqrt(np.mean(direction * direction))
    h = step * (size if size > 0 else 1.0)

    def at(multiple: int) -> float:
        return function({**params, name: value + multiple * h * direction})

    return (at(-2) - 8 * at(-1) + 8 * at(1) - at(2)) / (12 * h)
