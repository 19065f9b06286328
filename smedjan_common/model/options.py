"""Options: fields that are flags too. One line of a row's own class gives the default, the help, the smallest value and, its type
being a Literal, the choices."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

from smedjan_common.errors import ConfigError, flag, unknown


class Option(NamedTuple):
    """An option.

    choices: the names that it takes, () for a number or a switch. least: the smallest value. filled: what its default stands for, where
    that is worked out. shape_free: another value changes no tensor, so weights go on with it.
    """

    name: str
    type: Any
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    least: float | None = None
    filled: str = ""
    shape_free: bool = False


def option(default: Any, help: str = "", *, least: float | None = None, filled: str = "", shape_free: bool = False) -> Any:
    """A field of a dataclass that is an Option."""
    said = {"help": help, "least": least, "filled": filled, "shape_free": shape_free}
    return dataclasses.field(default=default, metadata={"option": said})


def options(cls: type) -> dict[str, Option]:
    """The options among the fields of a dataclass, inherited ones too, by name."""
    found = {}
    for f in dataclasses.fields(cls):
        if said := f.metadata.get("option"):
            choices = typing.get_args(f.type) if typing.get_origin(f.type) is typing.Literal else ()
            found[f.name] = Option(f.name, f.type, f.default, choices=choices, **said)
    return found


def check_options(config: Any, known: Mapping[str, Option]) -> None:
    """Raises ConfigError for a value of `config` that is none of the choices or under the least of an option."""
    for name, said in known.items():
        value = getattr(config, name)
        if said.choices and value not in said.choices:
            raise unknown(flag(name), str(value), said.choices)
        if said.least is not None and not value >= said.least:  # nan is not
            raise ConfigError(f"{flag(name)} is {value}.", f"It must be at least {said.least:g}.", "Leave it out for the default.")
