"""write_checkpoint and write_final: a checkpoint stands whole under its name, or not at all."""

import dataclasses
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import smedjan_common
from smedjan_common.backend import Snapshot
from smedjan_common.checkpoint.about import About, SavedTokenizer
from smedjan_common.checkpoint.load import KINDS, check_name, step_name
from smedjan_common.checkpoint.manifest import FORMAT, MANIFEST, OPTIMIZER, TOKENIZER, WEIGHTS, CheckpointInfo, check_layout, manifest_text
from smedjan_common.checkpoint.tensors import DTYPES, FileRecord, TensorRecord, dtype_code, write_order, write_tensors
from smedjan_common.errors import CheckpointError
from smedjan_common.files.atomic_directory import atomic_directory
from smedjan_common.files.durable import sync
from smedjan_common.files.names import FINAL

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def write_checkpoint(
    directory: str | Path, snapshot: Snapshot, about: About, *, metrics: Mapping[str, Any] | None = None, name: str | None = None
) -> Path:
    """Write `directory/name` (default `step-00001000`) atomically, in place of one of that name; returns its path.

    directory: the run's, made if it is not there. Where `snapshot.optimizer` has no arrays, the checkpoint holds weights only. An array
    is anything with dtype and shape that `np.asarray` takes: each is brought to the host and written in its turn, so memory does not
    grow with the model.

    Raises CheckpointError when the arrays are not of this model, or nothing can be written; older checkpoints stay whole.
    """
    target = Path(directory) / (name or step_name(snapshot.step))
    if name and target.name != name:
        raise unfit_name(name)
    arrays = {WEIGHTS: snapshot.params} | ({OPTIMIZER: snapshot.optimizer} if snapshot.optimizer else {})
    tensors = {file: {key: tensor_record(key, array) for key, array in values.items()} for file, values in arrays.items()}
    info = describe(target, FORMAT, snapshot.step, tensors, about, metrics)
    need = prepare(info)
    try:
        with atomic_directory(target) as temporary:
            for file, values in arrays.items():
                info.files[file], info.tensors[file] = write_tensors(temporary / file, values)
            complete(temporary, info, about.tokenizer)
    except OSError as error:
        raise cannot_write(target, error, need) from error
    return target


def write_final(directory: str | Path, snapshot: Snapshot, about: About, *, metrics: Mapping[str, Any] | None = None) -> Path:
    """Write `directory/final`: weights, configuration and tokenizer, no optimizer state. As write_checkpoint otherwise."""
    return write_checkpoint(directory, weights_of(snapshot), about, metrics=metrics, name=FINAL)


def weights_of(snapshot: Snapshot) -> Snapshot:
    """The same without the optimizer: what final/ has."""
    return dataclasses.replace(snapshot, optimizer={})


def attend(snapshot: Snapshot) -> None:
    """Take part in the writing of a snapshot whose arrays are on several hosts, on one that does not write it."""
    for arrays in (snapshot.params, snapshot.optimizer) if snapshot.shared else ():
        for name in write_order(arrays):
            arrays[name].gather()


def describe(
    target: Path,
    format: str,
    step: int,
    tensors: dict[str, dict[str, TensorRecord]],
    about: About,
    metrics: Mapping[str, Any] | None,
) -> CheckpointInfo:
    """What checkpoint.json of `target` will say but for its files. Raises CheckpointError when name or tensors do not fit."""
    if not _NAME.fullmatch(target.name):
        raise unfit_name(target.name)
    if not check_name(target.name, step, format):
        why = f"The number is the step, and the name says {KINDS[format].name}."
        raise CheckpointError(f"{target.name} cannot name step {step}.", why, f"Take {step_name(step, format)}, or another name.")
    optimizer = about.optimizer or (about.train.optimizer if about.train else "unknown")
    info = CheckpointInfo(
        path=target,
        step=int(step),
        model=about.model,
        train=about.train,
        optimizer=optimizer if len(tensors) > 1 else None,
        tokenizer_hash=about.tokenizer.hash if about.tokenizer else None,
        dataset=dict(about.dataset) if about.dataset is not None else None,
        framework=dict(about.framework),
        metrics=dict(metrics) if metrics is not None else None,
        extra=_extra(about),
        smedjan_version=smedjan_common.__version__,
        files={},
        tensors=tensors,
        format=format,
    )
    check_layout(info)
    return info


def _extra(about: About) -> dict[str, Any] | None:
    """What is more, and the hash of the chat template: a file that users may change, so it is not listed with the others."""
    chat = {"chat_template_sha256": about.tokenizer.chat.sha256} if about.tokenizer and about.tokenizer.chat else {}
    return {**(about.extra or {}), **chat} if chat or about.extra is not None else None


def prepare(info: CheckpointInfo) -> int:
    """Whether the place can take it: bytes that it needs. Raises CheckpointError."""
    need = sum(tensor.nbytes for tensors in info.tensors.values() for tensor in tensors.values())
    try:
        _check_target(info.path)
        _check_space(info.path.parent, need)
    except OSError as error:
        raise cannot_write(info.path, error, need) from error
    return need


def complete(temporary: Path, info: CheckpointInfo, tokenizer: SavedTokenizer | None) -> None:
    """Write what is left when the arrays stand: tokenizer.json, its chat template, and checkpoint.json last. Raises OSError."""
    if tokenizer:
        for name, content in {**(tokenizer.chat.files() if tokenizer.chat else {}), **tokenizer.ends.files()}.items():
            _write_synced(temporary / name, content)
        raw = tokenizer.json.encode()
        _write_synced(temporary / TOKENIZER, raw)
        info.files[TOKENIZER] = FileRecord(len(raw), hashlib.sha256(raw).hexdigest())
    _write_synced(temporary / MANIFEST, manifest_text(info).encode())


def unfit_name(name: str) -> CheckpointError:
    """The refusal of a directory's name."""
    return CheckpointError(f"{name!r} cannot name a checkpoint.", "It becomes a directory's name.", "Take letters, digits, - and _.")


def tensor_record(name: str, array: Any) -> TensorRecord:
    """The record of a tensor that is to be written, of its dtype and shape. Raises CheckpointError for a dtype that none holds."""
    try:
        return TensorRecord(dtype_code(array), tuple(map(int, array.shape)), 0)
    except KeyError:
        raise CheckpointError(f"{name} has dtype {array.dtype}.", f"A checkpoint holds {', '.join(DTYPES)}.", "Convert it first.") from None


def _check_target(target: Path) -> None:
    """Only a checkpoint, whole or broken, is ever replaced: nobody's other files are."""
    if not os.path.lexists(target) or any((target / name).exists() for name in (MANIFEST, WEIGHTS)):
        return
    if target.is_dir() and not any(target.iterdir()):
        return
    raise CheckpointError(
        f"{target} is in the way and is not a checkpoint.", "It was not written by smedjan, so it is not replaced.", "Move it elsewhere."
    )


def _check_space(directory: Path, need: int) -> None:
    place = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    total, _, free = shutil.disk_usage(place)
    if total and free < need:  # a total of 0: a file system that tells nothing
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))


def _write_synced(path: Path, raw: bytes) -> None:
    with open(path, "xb") as file:
        file.write(raw)
        file.flush()
        sync(file.fileno())


def cannot_write(target: Path, error: OSError, need: int) -> CheckpointError:
    """What a failing disk is to the user."""
    why, fix = f"{error.strerror or error}.", _FIXES.get(error.errno or 0, "Check the disk.")
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        why = f"{error.strerror}: it takes {need / 1e6:,.1f} MB."
    what = f"The checkpoint {target.name} could not be written to {target.parent}."
    return CheckpointError(what, f"{why} Older checkpoints are intact.", fix)


_NO_SPACE = "Free some space, lower --keep, or choose another disk with --checkpoint-dir."
_NO_ACCESS = "Make the directory writable, or choose another with --checkpoint-dir."
_FIXES = {
    errno.ENOSPC: _NO_SPACE,
    errno.EDQUOT: _NO_SPACE,
    errno.EFBIG: "Raise the limit on file sizes (ulimit -f), or choose another disk with --checkpoint-dir.",
    errno.EACCES: _NO_ACCESS,
    errno.EPERM: _NO_ACCESS,
    errno.EROFS: _NO_ACCESS,
    errno.ENOTDIR: "A part of the path is a file: choose another --checkpoint-dir.",
    errno.EEXIST: "A part of the path is a file: choose another --checkpoint-dir.",
}
