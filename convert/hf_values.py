"""Values of a config.json: numbers that are numbers, patterns, and what cannot be expressed."""

import math
from collections.abc import Mapping
from typing import Any

from smedjan_common.errors import CheckpointError, ConfigError
from smedjan_common.model.json_fields import MAX_EXTENT

_NOT_HERE = "The model cannot be expressed here."


def integer(values: Mapping[str, Any], key: str, where: str, default: int | None = None, limit: int = MAX_EXTENT) -> int:
    value: Any = default if values.get(key) is None else values[key]
    if type(value) is not int or not 1 <= value <= limit:
        raise CheckpointError(f"{where} has {key} {_short(value)}.", f"It must be a whole number, 1 to {limit}.", "Restore the file.")
    return value


def number(values: Mapping[str, Any], key: str, where: str, default: float | None = None) -> float:
    value: Any = default if values.get(key) is None else values[key]
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise CheckpointError(f"{where} has {key} {_short(value)}.", "It must be a number, 0 or more.", "Restore the file.")
    return float(value)


def inexpressible(where: str, what: str, why: str, fix: str = "a model that is the same without it") -> ConfigError:
    return ConfigError(f"{where} asks for {what}. {_NOT_HERE}", f"{why}.", f"Only this is missing: choose {fix}.")


def asks_for(values: Mapping[str, Any], where: str, **expected: Any) -> None:
    """Raises ConfigError for a key that is there and says something else."""
    for key, value in expected.items():
        if key in values and values[key] != value and values[key] is not None:
            raise inexpressible(where, f"{key} {values[key]!r}", f"Here it is always {value}")


def shortest(pattern: tuple[str, ...]) -> tuple[str, ...]:
    """The shortest pattern that repeats to this one."""
    for size in range(1, len(pattern)):
        if pattern == (pattern[:size] * -(-len(pattern) // size))[: len(pattern)]:
            return pattern[:size]
    return pattern


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
