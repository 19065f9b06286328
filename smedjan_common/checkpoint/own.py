"""A backend's own checkpoint, such as JAX's Orbax: the backend writes the arrays, everything around them is as in a neutral one.

    CHECKPOINT_DIR/orbax-00001000/   checkpoint.json   tokenizer.json   arrays/ (what the backend wrote, each file hashed)

Taking the state and writing it are two things: `start_own` returns when the state may change, and what it returns does the rest,
in a thread of its own if need be. The directory has its name when all of it is on the disk, not before.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from smedjan_common.backend import Backend, OwnFormat
from smedjan_common.checkpoint.about import About, SavedTokenizer
from smedjan_common.checkpoint.base import find_base, grown_base
from smedjan_common.checkpoint.load import KINDS, foreign, load_arrays, regular_hash, step_name, verify_info
from smedjan_common.checkpoint.manifest import ARRAYS, FORMAT, PARAMS, SLOTS, CheckpointInfo
from smedjan_common.checkpoint.read import with_offer
from smedjan_common.checkpoint.tensors import FileRecord
from smedjan_common.checkpoint.write import cannot_write, complete, describe, prepare, tensor_record
from smedjan_common.errors import CheckpointError, DamagedError
from smedjan_common.files.atomic_directory import atomic_directory
from smedjan_common.files.durable import sync, sync_directory
from smedjan_common.model.adapters import merged

FORMATS = {kind.name: format for format, kind in KINDS.items()}  # name on the command line -> format


def start_own(
    directory: str | Path,
    begin: Callable[[Path], Callable[[], None]],
    about: About,
    *,
    kind: str,
    step: int,
    params: Mapping[str, Any],
    optimizer_arrays: Mapping[str, Any],
    metrics: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Callable[[], Path]:
    """Start to write `directory/name` (default `orbax-00001000`); what is returned ends it, and returns its path or raises.

    kind: a name of KINDS. begin(folder): the backend starts to write into this new folder, returns when the state may change, and
    what it returns waits for the rest; both raise OSError. params, optimizer_arrays: anything with dtype and shape.
    Raises CheckpointError when it cannot be written; older checkpoints stay whole.
    """
    format = FORMATS[kind]
    target = Path(directory) / (name or step_name(step, format))
    groups = {PARAMS: params} | ({SLOTS: optimizer_arrays} if optimizer_arrays else {})
    tensors = {group: {key: tensor_record(key, array) for key, array in arrays.items()} for group, arrays in groups.items()}
    info = describe(target, format, step, tensors, about, metrics)
    writing = _write_in_two(info, prepare(info), begin, about.tokenizer)
    next(writing)

    def finish() -> Path:
        next(writing, None)
        return target

    return finish


def _write_in_two(
    info: CheckpointInfo, need: int, begin: Callable[[Path], Callable[[], None]], tokenizer: SavedTokenizer | None
) -> Iterator[None]:
    """Writes the directory, with one pause, when the state may change. An error, there or after it, removes the directory."""
    try:
        with atomic_directory(info.path) as temporary:
            wait = begin(temporary / ARRAYS)
            yield
            wait()
            info.files.update(_synced(temporary))
            complete(temporary, info, tokenizer)
    except OSError as error:
        raise cannot_write(info.path, error, need) from error


def read_weights(info: CheckpointInfo, own: OwnFormat | None, on_host: bool = False) -> dict[str, Any]:
    """The parameters of a checkpoint, neutral or `own`, its hashes compared first; of adapters those of the model that they make with
    their base. on_host: to compute with, as OwnFormat has it. Raises CheckpointError."""
    if info.adapter:
        return merged(info.model, info.adapter.adapters, _with_base(info, own))
    with _whole(info):
        if info.format == FORMAT:
            return load_arrays(info, optimizer=False).snapshot.params
        verify_info(info)
    return _owned(info, own).read_params(info.path / ARRAYS, on_host)


def read_state(info: CheckpointInfo, backend: Backend) -> Any:
    """The train state of a step checkpoint, neutral or the backend's own, on its devices; hashes are compared on the way.

    Raises DamagedError for one that is not whole, CheckpointError for one that is not of this run.
    """
    with _whole(info):
        if info.format == FORMAT:
            snapshot = load_arrays(info).snapshot
        else:
            verify_info(info)
            return _owned(info, backend.own).read(info.path / ARRAYS)
    if info.adapter:
        snapshot = replace(snapshot, params=_frozen(info, backend.own) | snapshot.params)
    return backend.restore(snapshot)


def _with_base(info: CheckpointInfo, own: OwnFormat | None) -> dict[str, Any]:
    """Adapters, and the frozen weights that they belong to."""
    with _whole(info):
        adapters = load_arrays(info, optimizer=False).snapshot.params
    return _frozen(info, own) | adapters


def _frozen(info: CheckpointInfo, own: OwnFormat | None) -> dict[str, Any]:
    assert info.adapter
    return grown_base(info.model, info.adapter.adapters, read_weights(find_base(info), own, on_host=True))


@contextlib.contextmanager
def _whole(info: CheckpointInfo) -> Iterator[None]:
    """What is wrong with the checkpoint is damage, told with another one to go on from."""
    try:
        yield
    except CheckpointError as error:
        offer = with_offer(info.path, error, verify=True)
        raise DamagedError(info.path, offer.what, offer.why, offer.fix) from None


def check_readable(info: CheckpointInfo, backend: str) -> None:
    """Raises CheckpointError, with the command that helps, for a checkpoint that only another backend reads."""
    if KINDS[info.format].backend not in {None, backend}:
        raise foreign(info)


def _owned(info: CheckpointInfo, own: OwnFormat | None) -> OwnFormat:
    if own is None or own.name != KINDS[info.format].name:
        raise foreign(info)
    return own


def _synced(temporary: Path) -> dict[str, FileRecord]:
    """Every file below ARRAYS, on the disk and hashed."""
    files = {}
    for folder, _, names in os.walk(temporary / ARRAYS, topdown=False):
        for name in sorted(names):
            path = Path(folder, name)
            fd = os.open(path, os.O_RDONLY)
            try:
                sync(fd)
            finally:
                os.close(fd)
            files[path.relative_to(temporary).as_posix()] = FileRecord(path.stat().st_size, regular_hash(path))
        sync_directory(Path(folder))
    return files
