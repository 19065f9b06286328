"""Flags made of options: the fields of a group of flags, with default, help and choices, from the rows that define them."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from tyro.conf import arg

from smedjan_common.model.ffns import FFNS
from smedjan_common.model.ffns.experts import ROUTERS
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.options import Option, options
from smedjan_common.model.shape import Shape
from smedjan_common.optional import MaybeFloat, MaybeInt
from smedjan_common.training.adaptation import Adaptation
from smedjan_common.training.config import Basics, TrainConfig
from smedjan_common.training.objectives import OBJECTIVES
from smedjan_common.training.optimizers import OPTIMIZERS, Averaged
from smedjan_common.training.schedule import SCHEDULES


def option_flags(name: str, found: Iterable[Option]) -> Any:
    """A frozen dataclass with a flag for each option. The configuration refuses what is none of the choices, and names near ones."""
    fields = [(option.name, Annotated[_type(option), _argument(option)], option.flag_default) for option in found]
    return dataclasses.make_dataclass(name, fields, frozen=True)


def shape_options() -> list[Option]:
    """The options of every model that are flags as they stand."""
    return [option for option in options(Shape).values() if option.help]


def row_options() -> list[Option]:
    """The options of mixers and feed-forwards; the help says whose it is."""
    known: dict[str, Option] = {}
    for row in (*MIXERS.values(), *FFNS.values()):
        for name, option in row.own.items():
            owners = [other.name for other in MIXERS.values() if name in other.own]
            whose = f"{', '.join(owners)}: " if owners else ""
            known.setdefault(name, option._replace(help=whose + option.help))
    return list(known.values())


def training_options() -> list[Option]:
    """The options of training that are flags of all commands: those of rows behind the option that chooses among the rows."""
    behind: Mapping[str, Iterable[type | None]] = {
        "lr_schedule": [row.options for row in SCHEDULES.values()],
        "optimizer": [*(row.options for row in OPTIMIZERS.values()), Averaged],
        "dtype": [row.training for row in MIXERS.values()],
        "z_loss": ROUTERS.values(),
    }
    known: dict[str, Option] = {}
    for name, option in options(Basics).items():
        known[name] = option
        for reads in behind.get(name, ()):
            known |= options(reads)
    known |= options(Adaptation)
    of_objectives = {name for row in OBJECTIVES.values() for name in options(row.options)}
    assert known.keys() | of_objectives == options(TrainConfig).keys(), "TrainConfig inherits the options of every row"
    flags = {name: option for name, option in known.items() if option.help}
    return [_by_optimizer(option) if name in ("beta2", "weight_decay") else option for name, option in flags.items()]


def objective_options(command: str) -> list[Option]:
    """The options of the objectives of a command, which are flags of that command alone."""
    known: dict[str, Option] = {}
    for row in OBJECTIVES.values():
        known |= options(row.options) if row.command == command else {}
    return list(known.values())


_CHATS: dict[str, dict[str, Any]] = {  # what differs where conversations are learned
    "steps": {"filled": "--epochs times over the conversations"},
    "lr": {"filled": "a fifth of that of `train`: 6e-5 * sqrt(4096 / dim); with --lora-rank ten times as much"},
    "warmup": {"filled": "10% of --steps, at most 1000"},
    "weight_decay": {"unset": 0.0, "filled": ""},
    "packing": {"unset": "documents"},
    "mask_documents": {"unset": True},
}


def chat_training_options() -> list[Option]:
    """The options of training with the defaults for conversations: whole ones in a row, kept apart."""
    return [option._replace(**_CHATS.get(option.name, {})) for option in training_options()]


_PAIRS = _CHATS | {  # what differs where pairs of answers are
    "steps": {"filled": "--epochs times over the pairs"},
    "lr": {"filled": "a two-hundredth of that of `train`: 1.5e-6 * sqrt(4096 / dim); with --lora-rank ten times as much"},
}


def pair_training_options() -> list[Option]:
    """The options of training with the defaults for pairs of answers, those of their losses behind the others."""
    known = [option._replace(**_PAIRS.get(option.name, {})) for option in training_options()]
    return [*known, *objective_options("dpo")]


def _by_optimizer(option: Option) -> Option:
    """An option whose default the row of the optimizer says."""
    values = {name: getattr(row, option.name) for name, row in OPTIMIZERS.items()}
    usual = values["adamw"]
    others = "".join(f"; {name}: {value:g}" for name, value in values.items() if value != usual)
    adapted = "; 0 with --lora-rank" if option.name == "weight_decay" else ""
    return option._replace(filled=f"{usual:g}{others}{adapted}")


def _type(option: Option) -> Any:
    if option.flag_default is None:
        return {int: MaybeInt, float: MaybeFloat}[option.type]
    return str if option.choices else option.type


def _argument(option: Option) -> Any:
    said: dict[str, Any] = {"help": option.help}
    if option.choices:
        extra = () if option.pattern or option.flag_default in option.choices else (option.flag_default,)  # auto
        said["metavar"] = "|".join((*extra, *option.choices)) + (",..." if option.pattern else "")
    elif option.filled:
        said["metavar"] = option.type.__name__.upper()
        said["help_behavior_hint"] = f"(default: {option.filled})"
    return arg(**said)
