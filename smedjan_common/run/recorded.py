"""What config.json of a run records of its flags, and how a run that goes on gets them back."""

import dataclasses
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smedjan_common.errors import ConfigError
from smedjan_common.run.flags import GROUPS, TrainFlags
from smedjan_common.training.config import CHECKPOINT_FORMATS

if TYPE_CHECKING:
    pass
from smedjan_common.model.json_fields import is_of

RECALLED = {
    "data": None,
    "report": None,
    "run": ("checkpoint_every", "checkpoint_format", "keep", "keep_every"),
}  # groups (fields) that config.json records


def check_recorded(file: Path, recorded: dict[str, Any]) -> None:
    """Raises ConfigError for what `file` of a run records and a run cannot have recorded: flags and datasets of wrong types."""
    fix = "Restore it from a copy, or remove it and give the flags of the run again."
    flags = recorded.get("flags")
    if not isinstance(flags, dict | None):
        raise ConfigError(f"{file} is damaged, or was edited.", f'Its "flags" is {flags!r}, not a JSON object.', fix)
    for name, hint in _recorded_types().items():
        if flags and name in flags and not is_of(hint, flags[name]):
            raise ConfigError(f"{file} is damaged, or was edited.", f'Its "{name}" in "flags" is {flags[name]!r}.', fix)
    if flags and (kind := flags.get("checkpoint_format", "neutral")) not in CHECKPOINT_FORMATS:
        raise ConfigError(f"{file} has an unknown checkpoint_format.", f"It is {kind!r}; known: {', '.join(CHECKPOINT_FORMATS)}.", fix)
    for name in ("dataset", "val_dataset"):
        if not is_dataset(recorded.get(name)):
            raise ConfigError(f"{file} is damaged, or was edited.", f'Its "{name}" does not describe token files.', fix)


def _recorded_types() -> dict[str, Any]:
    types = {group: typing.get_type_hints(GROUPS[group]) for group in RECALLED}
    return {name: types[group][name] for group, only in RECALLED.items() for name in only or types[group]}


def is_dataset(data: Any) -> bool:
    """Whether `data` is as RunFolder describes a token file or a mixture; None: that there is none."""
    if not isinstance(data, dict):
        return data is None
    files = data.get("files", [data])
    if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
        return False
    return all(isinstance(file.get("path"), str) and is_of(float, file.get("weight", 1.0)) for file in files)


def recall(flags: TrainFlags, given: frozenset[str], recorded: dict[str, Any]) -> TrainFlags:
    """`flags` with what was not given taken from a run's recorded flags."""
    groups = {}
    for group in RECALLED:
        values = getattr(flags, group)
        names = [f.name for f in dataclasses.fields(values) if f.name in to_record(flags)]
        known = {name: _tuple(recorded[name]) for name in names if name not in given and name in recorded}
        if group == "data" and "dataset" in given:
            known.pop("val_dataset", None)  # it belongs to the other dataset
        groups[group] = dataclasses.replace(values, **known)
    return dataclasses.replace(flags, **groups)


def to_record(flags: TrainFlags) -> dict[str, Any]:
    """The flags that config.json records."""
    names = {group: only or [f.name for f in dataclasses.fields(GROUPS[group])] for group, only in RECALLED.items()}
    return {name: getattr(getattr(flags, group), name) for group, fields in names.items() for name in fields}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
