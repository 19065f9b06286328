"""Frozen dataclasses <-> dicts of JSON values, and how large a whole number in them may be."""

import dataclasses
import math
import typing
from typing import Any, Self

from smedjan_common.errors import ConfigError, flag, near


class JsonFields:
    """Dataclass <-> dict of JSON values; unknown and missing keys are refused by name."""

    def to_dict(self) -> dict[str, Any]:
        return {f.name: list(v) if isinstance(v := getattr(self, f.name), tuple) else v for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for key in values:
            if key not in known:
                raise ConfigError(f"{cls.__name__} has no field {key!r}.", "The file may come from a newer smedjan.", near(key, known))
        for name, f in known.items():
            if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise ConfigError(f"{cls.__name__} lacks the field {name!r}.", "The file is incomplete.", "Restore it from a good copy.")
        config = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        config._validate_stored()
        return config

    def validate(self) -> None:
        """Raises ConfigError for what cannot work."""
        raise NotImplementedError

    def _validate_stored(self) -> None:
        """As validate, for values that were written once, and must stay readable."""
        self.validate()


MAX_EXTENT = 1 << 24  # no vocabulary or width is larger: a file with a larger one is read as damaged

MAX_POSITION = 1 << 62  # the same of what counts steps or positions

MAX_LENGTH = 4096  # of a list, where there are limits

UNBOUNDED = ("context_length", "rope_original_len", "steps", "seq_len", "warmup", "seed")  # up to MAX_POSITION


def check_extents(config: JsonFields) -> None:
    for f in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, f.name)
        if type(value) is int:
            check_extent(f.name, value)


def check_extent(name: str, value: int) -> None:
    if value > most(name):
        raise ConfigError(f"{flag(name)} is {value}.", f"It must be at most {most(name)}.", "Give a smaller number.")


def most(name: str) -> int:
    """The largest whole number that a field may have, in a flag as in a file: a damaged one must not make a loop long."""
    return MAX_POSITION if name in UNBOUNDED else MAX_EXTENT


def is_of(hint: Any, value: Any, limit: float = math.inf) -> bool:
    """Whether a value of JSON is of a field's type, whole numbers up to `limit`. Which names a field takes, the configuration says."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return type(value) is list and (limit == math.inf or len(value) <= MAX_LENGTH) and all(is_of(parts[0], v, limit) for v in value)
    if typing.get_origin(hint) is typing.Literal:
        return type(value) in {type(part) for part in parts}
    if parts:  # a union
        return any(is_of(part, value, limit) for part in parts)
    if hint is float:
        return type(value) in (int, float) and abs(value) < math.inf
    return type(value) is hint and (hint is not int or abs(value) <= limit)
