"""smedjan's own checkpoints as a source and as a destination. Reading takes a step-*/, a final/, or a run: its newest weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.portable import Lazy, Portable, Show, cast, check_equal, watched
from convert.safetensors_file import open_tensors
from smedjan_common.backend import Snapshot
from smedjan_common.checkpoint import CheckpointInfo, read_info, verify_checkpoint, write_checkpoint
from smedjan_common.checkpoint.directory import FINAL, step_directories
from smedjan_common.checkpoint.manifest import MANIFEST, TOKENIZER, WEIGHTS
from smedjan_common.errors import CheckpointError, SmedjanError
from smedjan_common.tokenizer import Tokenizer


def detect(path: Path) -> bool:
    """Whether a directory is a checkpoint or holds some."""
    return (path / MANIFEST).is_file() or (path / FINAL / MANIFEST).is_file() or bool(step_directories(path))


def read(path: Path) -> Portable:
    """The newest weights under `path`. Every byte is compared with its hash first. Raises CheckpointError."""
    info = newest(path)
    verify_checkpoint(info.path)
    tokenizer = Tokenizer.load(info.path / TOKENIZER) if TOKENIZER in info.files else None
    stored = open_tensors(info.path / WEIGHTS)
    order = info.tensors[WEIGHTS]
    source = {"format": "neutral", "step": info.step, "framework": info.framework}
    return Portable(info.model, {name: stored[name] for name in order}, tokenizer, info.step, source)


def newest(path: Path) -> CheckpointInfo:
    """What checkpoint.json says of the newest weights: of a run, its final/ unless a later step was saved since."""
    info, final = read_info(path), path / FINAL
    if info.path != path and info.path.name != FINAL and (final / MANIFEST).is_file():
        last = read_info(final)
        return last if last.step >= info.step else info
    return info


def write(model: Portable, target: Path, show: Show) -> list[str]:
    """Write `target` as a checkpoint of weights only, like final/; training starts from it with --pretrained.

    Raises CheckpointError when it cannot be written or reads back differently.
    """
    tensors = {name: cast(name, tensor, np.dtype(np.float32)) for name, tensor in model.tensors.items()}
    arrays: dict[str, Any] = dict(watched(tensors, "write", show))  # each becomes an array when its turn comes
    write_checkpoint(
        target.parent,
        Snapshot(model.step, arrays, {}),
        model=model.config,
        train=None,
        tokenizer_json=model.tokenizer.to_json() if model.tokenizer else None,
        tokenizer_hash=model.tokenizer.hash if model.tokenizer else None,
        dataset=None,
        framework={"name": "convert"},
        extra={"converted_from": model.source},
        name=target.name,
    )
    _verify(target, model, watched(tensors, "verify", show))
    return []


def _verify(target: Path, model: Portable, expected: Mapping[str, Lazy]) -> None:
    try:
        again = read(target)
    except SmedjanError as error:
        raise CheckpointError(f"{target} is not what was written: {error.what}", error.why, "Check the disk and try again.") from None
    check_equal(str(target), again.tensors, expected)
    if again.config != model.config or (again.tokenizer and again.tokenizer.hash) != (model.tokenizer and model.tokenizer.hash):
        raise CheckpointError(f"{target} is not what was written.", "Its configuration or tokenizer differs.", "Report this.")
