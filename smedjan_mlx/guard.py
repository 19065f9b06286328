"""MLX's out-of-memory errors, told as ours."""

from collections.abc import Callable
from typing import Any

from smedjan_common.backend import LESS_TO_TRAIN, out_of_memory


def guarded(function: Callable, *args: Any, fix: str = LESS_TO_TRAIN) -> Any:
    """What the function gives. Raises OutOfMemoryError, with `fix`, where the device is full."""
    try:
        return function(*args)
    except RuntimeError as error:
        text = str(error)
        if not any(sign in text.lower() for sign in ("unable to allocate", "out of memory", "insufficient memory", "[malloc")):
            raise
        raise out_of_memory(text, fix) from error
