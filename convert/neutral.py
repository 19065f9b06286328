"""smedjan's own checkpoints as a source and as a destination. Reading takes a step-*/, a final/, or a run: its newest weights."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from convert.portable import Lazy, Portable, cast, check_equal
from convert.safetensors_file import open_tensors
from smedjan_common.backend import Snapshot
from smedjan_common.checkpoint import (
    ADAPTER,
    FORMAT,
    About,
    CheckpointInfo,
    SavedTokenizer,
    find_base,
    lazy_weights,
    newest,
    read_info,
    verify_checkpoint,
    with_bases,
    write_checkpoint,
)
from smedjan_common.checkpoint.directory import step_directories
from smedjan_common.checkpoint.lazy import Show, watched
from smedjan_common.checkpoint.manifest import MANIFEST, OPTIMIZER, TOKENIZER, WEIGHTS
from smedjan_common.errors import CheckpointError, SmedjanError
from smedjan_common.files.atomic_directory import standing
from smedjan_common.files.names import FINAL
from smedjan_common.tokenizer import Tokenizer


def detect(path: Path) -> bool:
    """Whether a directory is a neutral checkpoint, or holds some whose newest is neutral."""
    return found_format(path) == FORMAT


def read(path: Path) -> Portable:
    """The newest weights under `path`; of adapters the model that they make with their base. Every byte is compared with its hash first.
    Raises CheckpointError."""
    info = newest(path)
    for each in with_bases(info):
        verify_checkpoint(each.path)
    if info.adapter:
        return _merged(info)
    tokenizer = Tokenizer.load(info.path / TOKENIZER) if TOKENIZER in info.files else None
    source = {"format": "neutral", "step": info.step, "framework": info.framework}
    slots = _stored(info, OPTIMIZER) if info.optimizer else {}
    return Portable(info.model, _stored(info, WEIGHTS), tokenizer, info.step, source, slots=slots, info=info)


def _merged(info: CheckpointInfo) -> Portable:
    """A whole model, which no optimizer state belongs to."""
    tokenizer = Tokenizer.load(info.path / TOKENIZER) if TOKENIZER in info.files else None
    rest = {name: value for name, value in (info.extra or {}).items() if name != ADAPTER}
    whole = replace(info, train=info.train.of_whole_model() if info.train else None, optimizer=None, extra=rest)
    source = {"format": "neutral", "step": info.step, "framework": info.framework}
    note = f"The adapters of {info.path} are merged with {find_base(info).path}."
    return Portable(info.model, lazy_weights(info), tokenizer, info.step, source, notes=(note,), info=whole)


def _stored(info: CheckpointInfo, file: str) -> dict[str, Lazy]:
    stored = open_tensors(info.path / file)
    return {name: stored[name] for name in info.tensors[file]}


def found_format(path: Path) -> str | None:
    """The format of the checkpoint with the newest weights under `path`, None where there is none."""
    if not ((path / MANIFEST).is_file() or (path / FINAL / MANIFEST).is_file() or step_directories(path)):
        return None
    try:
        return newest(path).format
    except CheckpointError:
        return FORMAT  # a broken one: reading it says what is wrong


def training_state(path: Path) -> Path:
    """Of a run, the newest step checkpoint, which training goes on from, unless final/ is of a later step; else `path` itself."""
    if (path / MANIFEST).is_file() or not (steps := step_directories(path)):
        return path
    last = steps[-1]
    final = standing(path / FINAL)
    newer = (final / MANIFEST).is_file() and read_info(final).step > last.step
    return final if newer else last.path


def write(model: Portable, target: Path, show: Show) -> list[str]:
    """Write `target` as a checkpoint: a step's with everything that training goes on from, or weights only, like final/.

    Raises CheckpointError when it cannot be written or reads back differently.
    """
    params, slots = float32(model.tensors), float32(model.slots)
    arrays: dict[str, Any] = dict(watched({**params, **slots}, "write", show))  # each becomes an array when its turn comes
    taken = Snapshot(model.step, {name: arrays[name] for name in params}, {name: arrays[name] for name in slots})
    write_checkpoint(target.parent, taken, about(model), metrics=metrics(model), name=target.name)
    _verify(target, model, watched({**params, **slots}, "verify", show))
    return []


def about(model: Portable) -> About:
    """What checkpoint.json says of the model, whatever is to hold its arrays."""
    tokenizer, from_where = model.tokenizer and SavedTokenizer.of(model.tokenizer), {"converted_from": model.source}
    if not (info := model.info):
        return About(model=model.config, tokenizer=tokenizer, framework={"name": "convert"}, extra=from_where)
    return About(
        model=model.config,
        train=info.train,
        tokenizer=tokenizer,
        dataset=info.dataset,
        framework=info.framework,
        optimizer=info.optimizer,
        extra=(info.extra or {}) | from_where,
    )


def metrics(model: Portable) -> dict[str, Any] | None:
    """The last metrics of the run that it is from."""
    return model.info.metrics if model.info else None


def float32(tensors: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """As smedjan keeps them."""
    return {name: cast(name, tensor, np.dtype(np.float32)) for name, tensor in tensors.items()}


def _verify(target: Path, model: Portable, expected: Mapping[str, Lazy]) -> None:
    try:
        again = read(target)
    except SmedjanError as error:
        raise CheckpointError(f"{target} is not what was written: {error.what}", error.why, "Check the disk and try again.") from None
    check_equal(str(target), {**again.tensors, **again.slots}, expected)
    check_same(target, again, model)


def check_same(target: Path, again: Portable, model: Portable) -> None:
    """Raises CheckpointError when configuration, step, tokenizer or training are not what was to be written."""
    facts = [(side.config, side.step, side.tokenizer and (side.tokenizer.hash, side.tokenizer.chat)) for side in (again, model)]
    kept = [(side.info.train, side.info.dataset, side.info.optimizer) if side.info else None for side in (again, model)]
    if facts[0] != facts[1] or (model.info and kept[0] != kept[1]):
        raise CheckpointError(f"{target} is not what was written.", "Its configuration or tokenizer differs.", "Report this.")
