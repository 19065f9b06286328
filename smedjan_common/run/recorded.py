"""What config.json of a run records of its flags, and how a run that goes on gets them back."""

import dataclasses
import os
import typing
from pathlib import Path
from typing import Any

from smedjan_common.errors import ConfigError
from smedjan_common.model.json_fields import is_of
from smedjan_common.remote.address import is_remote, shown
from smedjan_common.run.flags import ALL_GROUPS, DpoFlags, SftFlags, TrainFlags
from smedjan_common.training.config import CHECKPOINT_FORMATS

RECALLED = ("data", "report", "run")  # groups of flags that config.json records, those of one start aside
_OF_CHATS = (*RECALLED, "chats")
COUNTS = {  # the least of each flag that counts batches, tokens or checkpoints
    **dict.fromkeys(("checkpoint_every", "keep", "keep_every", "log_every", "eval_every", "sample_every"), 0),
    **dict.fromkeys(("eval_batches", "sample_tokens"), 1),
}
_PATHS = ("dataset", "val_dataset", "tokenizer", "pretrained", "reference", "teacher_checkpoint")  # recorded as they are from any directory
NO_REFERENCE = ("reference", "none")  # a value that is no path


def check_recorded(file: Path, recorded: dict[str, Any]) -> None:
    """Raises ConfigError for what `file` of a run records and a run cannot have recorded: flags and datasets of wrong types."""
    fix = "Restore it from a copy, or remove it and give the flags of the run again."
    flags = recorded.get("flags")
    if not isinstance(flags, dict | None):
        raise ConfigError(f"{file} is damaged, or was edited.", f'Its "flags" is {flags!r}, not a JSON object.', fix)
    for name, hint in _recorded_types().items():
        if flags and name in flags and not is_of(hint, flags[name]):
            raise ConfigError(f"{file} is damaged, or was edited.", f'Its "{name}" in "flags" is {flags[name]!r}.', fix)
        if flags and flags.get(name) is not None and flags[name] < COUNTS.get(name, flags[name]):
            raise ConfigError(f"{file} is damaged, or was edited.", f'Its "{name}" in "flags" is {flags[name]}.', fix)
    if flags and (kind := flags.get("checkpoint_format", "neutral")) not in CHECKPOINT_FORMATS:
        raise ConfigError(f"{file} has an unknown checkpoint_format.", f"It is {kind!r}; known: {', '.join(CHECKPOINT_FORMATS)}.", fix)
    for name in ("dataset", "val_dataset"):
        if not is_dataset(recorded.get(name)):
            raise ConfigError(f"{file} is damaged, or was edited.", f'Its "{name}" does not describe token files.', fix)


def _recorded_types() -> dict[str, Any]:
    types = {group: typing.get_type_hints(ALL_GROUPS[group]) for group in _OF_CHATS}
    return {name: types[group][name] for group in _OF_CHATS for name in recorded_names(group)}


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
    for group in _groups(flags):
        values = getattr(flags, group)
        known = {name: _tuple(recorded[name]) for name in _names(flags, group) if name not in given and name in recorded}
        if group == "data" and "dataset" in given:
            known.pop("val_dataset", None)  # it belongs to the other dataset
        groups[group] = dataclasses.replace(values, **known)
    return dataclasses.replace(flags, **groups)


def to_record(flags: TrainFlags) -> dict[str, Any]:
    """The flags that config.json records; paths are absolute, since the run may go on from another directory."""
    values = {name: getattr(getattr(flags, group), name) for group in _groups(flags) for name in _names(flags, group)}
    paths = [name for name in _PATHS if name in values and (name, values[name]) != NO_REFERENCE]
    return values | {name: _absolute(values[name]) for name in paths}


def _groups(flags: TrainFlags) -> tuple[str, ...]:
    return _OF_CHATS if isinstance(flags, SftFlags | DpoFlags) else RECALLED


def _names(flags: TrainFlags, group: str) -> list[str]:
    """The flags of a group that config.json records and this command has."""
    return [name for name in recorded_names(group) if hasattr(getattr(flags, group), name)]


def recorded_names(group: str) -> tuple[str, ...]:
    """The flags of a group that config.json records."""
    return tuple(f.name for f in dataclasses.fields(ALL_GROUPS[group]) if "this_start" not in f.metadata)


def _absolute(value: Any) -> Any:
    """Of a path, PATH.bin:WEIGHT too, or of several."""
    if value is None:
        return None
    return _place(value) if isinstance(value, str) else tuple(map(_place, value))


def _place(path: str) -> str:
    return shown(path) if is_remote(path) else os.path.abspath(path)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
