"""Options: fields of a configuration that are flags too. One line gives the default, the help, the bounds and, as a Literal or a
list of names, the choices: configuration, JSON, flag and checks are made of it."""

import dataclasses
import functools
import math
import typing
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from smedjan_common.errors import ConfigError, flag, unknown

REQUIRED = dataclasses.MISSING  # the default of an option that a configuration always says


class Option(NamedTuple):
    """An option.

    choices: the names that it takes, () for a number or a switch. least, over, most, under: its bounds.
    unset: the flag's default, where it is another one than the field's. filled: in words, what a default is worked out to.
    shape_free: another value changes no tensor, so weights go on with it. inert: nor what the tensors compute, so a run goes on with it.
    fixed: it says which text a step sees, so a run that goes on keeps it.
    """

    name: str
    type: Any
    default: Any
    help: str
    choices: tuple[str, ...]
    least: float | None
    over: float | None
    most: float | None
    under: float | None
    unset: Any
    filled: str
    shape_free: bool
    inert: bool
    fixed: bool

    @property
    def pattern(self) -> bool:
        """Whether it is a pattern over the depth, names of its choices: layer i has the one at i modulo their number."""
        return typing.get_origin(self.type) is tuple

    @property
    def flag_default(self) -> Any:
        """What the flag is when it is not given; None: worked out from other flags."""
        default = self.default if self.unset is dataclasses.MISSING else self.unset
        return ",".join(default) if self.pattern else default


def option(
    default: Any,
    help: str = "",
    *,
    choices: Iterable[str] = (),
    least: float | None = None,
    over: float | None = None,
    most: float | None = None,
    under: float | None = None,
    unset: Any = dataclasses.MISSING,
    filled: str = "",
    shape_free: bool = False,
    inert: bool = False,
    fixed: bool = False,
) -> Any:
    """A field of a dataclass that is an Option; its choices may also be said by its type, a Literal."""
    said = {"help": help, "choices": tuple(choices), "least": least, "over": over, "most": most, "under": under}
    said |= {"unset": unset, "filled": filled, "shape_free": shape_free, "inert": inert, "fixed": fixed}
    return dataclasses.field(default=default, metadata={"option": said})


def options(cls: type | None) -> dict[str, Option]:
    """The options among the fields of a dataclass, inherited ones too, by name. None has none."""
    return dict(_options(cls)) if cls else {}


@functools.cache
def _options(cls: type) -> dict[str, Option]:
    found = {}
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        if said := f.metadata.get("option"):
            choices = typing.get_args(f.type) if typing.get_origin(f.type) is typing.Literal else said["choices"]
            found[f.name] = Option(f.name, f.type, f.default, **{**said, "choices": choices})
    return found


def check_options(config: Any, known: Mapping[str, Option]) -> None:
    """Raises ConfigError for a value of `config` that is none of an option's choices or outside its bounds."""
    for name, said in known.items():
        value = getattr(config, name)
        parts = value if said.pattern else (value,)
        if not parts:
            raise ConfigError(f"{flag(name)} is empty.", "It is a pattern over the depth.", f"Known: {', '.join(said.choices)}.")
        if said.choices and (odd := [part for part in parts if part not in said.choices]):
            raise unknown(flag(name), str(odd[0]), said.choices)
        if type(value) in (int, float) and not _within(said, value):
            raise ConfigError(f"{flag(name)} is {value}.", f"It must be {_range(said, value)}.", "Leave it out for the default.")


def _within(said: Option, value: float) -> bool:
    return (
        (type(value) is int or math.isfinite(value))
        and (said.least is None or value >= said.least)
        and (said.over is None or value > said.over)
        and (said.most is None or value <= said.most)
        and (said.under is None or value < said.under)
    )


def _range(said: Option, value: float) -> str:
    finite = [] if type(value) is int or math.isfinite(value) else ["finite"]
    bounds = (("at least", said.least), ("over", said.over), ("at most", said.most), ("under", said.under))
    return ", ".join(finite + [f"{word} {bound:g}" for word, bound in bounds if bound is not None])
