"""XLA's out-of-memory errors, told as ours."""

from collections.abc import Callable
from typing import Any

import jax

from smedjan_common.backend import LESS_TO_TRAIN, out_of_memory


def guarded(function: Callable, *args: Any, fix: str = LESS_TO_TRAIN) -> Any:
    """What the function gives. Raises OutOfMemoryError, with `fix`, where the device is full."""
    try:
        return function(*args)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise out_of_memory(str(error), fix) from error
