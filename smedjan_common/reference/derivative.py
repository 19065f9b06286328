"""Directional derivatives of a float64 function of the parameters: what every gradient is checked against.

    d/dh f(p + h d) at 0  =  (f(-2h) - 8 f(-h) + 8 f(h) - f(2h)) / 12h  +  h^4 f^(5) / 30

Step size. `step` counts in units of the tensor's own size (its root mean square), so that it means the same for a norm's
weight near 1 and a projection near 0.02. The truncation falls as step^4, the rounding of f (a few 1e-16 of a loss near 4, over
12h) grows as 1/step. Measured over all tensors of the conformance suite, as a part of the gradient's norm:

    step     1e-3      5e-4      2.5e-4    1.2e-4    3e-5
    error    6.4e-9    3.7e-10   1.1e-10   2.2e-10   1.7e-9

So 2.5e-4: five orders below the gate of 1e-5, and a factor of four either way does not matter (tests/unit/test_reference.py).
"""

from collections.abc import Callable

import numpy as np

Params = dict[str, np.ndarray]
STEP = 2.5e-4


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
