"""read_checkpoint: from whatever path a user gives to a checkpoint in memory, or to an error that names a way on."""

import json
import os
from pathlib import Path

from smedjan_common.checkpoint.directory import OnSkip, latest_checkpoint, step_directories
from smedjan_common.checkpoint.load import Checkpoint, faults, load, load_info, step_of
from smedjan_common.checkpoint.manifest import MANIFEST, CheckpointInfo
from smedjan_common.checkpoint.tensors import open_regular
from smedjan_common.errors import CheckpointError
from smedjan_common.files.atomic_directory import standing
from smedjan_common.files.names import CONFIG, FINAL
from smedjan_common.nearby import beside


def read_checkpoint(path: str | Path, *, optimizer: bool = True, verify: bool = True, on_skip: OnSkip | None = None) -> Checkpoint:
    """Read a checkpoint, whole or not at all; takes the memory of its arrays and a few MB more.

    `path` is a `step-*/` or `final/` directory, or a run directory: then its newest `step-*/`, or `final/` if there is none.
    `optimizer=False` reads weights only. `verify=False` compares no hash of tensor data; sizes, names and shapes are checked
    all the same. With `on_skip`, a run directory's broken checkpoints are told to it, one sentence each, and the next older one is
    taken; without, the newest being broken is an error. Arrays have the dtype of the file (float32; bfloat16 as ml_dtypes has it).

    Raises CheckpointError naming file and tensor, why, and the newest good other checkpoint of the directory.
    """
    path = standing(Path(path))
    if not _is_run(path):
        return _read(path, optimizer, verify)
    broken = []
    for _, step_path in reversed(step_directories(path)):
        try:
            return load(step_path, optimizer=optimizer, verify=verify)
        except CheckpointError as error:
            if on_skip is None:
                raise with_offer(step_path, error, verify) from None
            broken.append(f"{error.what} {error.why}")
            on_skip(broken[-1])
    final = standing(path / FINAL)
    if broken and not (final / MANIFEST).exists():
        raise CheckpointError(f"{path} holds no good checkpoint.", broken[0], "Restore one from a copy, or start a new run.")
    return _read(final, optimizer, verify)


def read_info(path: str | Path) -> CheckpointInfo:
    """What checkpoint.json of a checkpoint (or of a run directory's newest) says, without reading tensors. Raises CheckpointError."""
    path = standing(Path(path))
    if _is_run(path):
        found = step_directories(path)
        path = found[-1].path if found else standing(path / FINAL)
    try:
        return load_info(path)
    except CheckpointError as error:
        raise with_offer(path, error) from None


def newest(path: str | Path) -> CheckpointInfo:
    """What checkpoint.json of the newest weights says: of a run directory final/'s, unless a later step was saved since.

    Another path is that checkpoint itself, as read_info has it. Raises CheckpointError.
    """
    info, final = read_info(path), standing(Path(path) / FINAL)
    if info.path == standing(Path(path)) or info.path == final or not (final / MANIFEST).is_file():
        return info
    last = read_info(final)
    return last if last.step >= info.step else info


def _is_run(path: Path) -> bool:
    """Whether to look for checkpoints in the directory; raises CheckpointError when it is none and holds none."""
    with faults(path):
        if not path.is_dir():
            raise with_offer(path, _no_directory(path))
        if (path / MANIFEST).exists() or step_of(path.name) is not None or path.name == FINAL:
            return False
        if _holds_any(path):
            return True
        foreign = any(path.glob("*.safetensors"))
        runs = sorted(str(inside) for inside in path.iterdir() if inside.is_dir() and _holds_any(inside))
    if foreign and is_quantized(path):
        what, why = f"The weights of {path} are quantised.", "They are to infer with: only whole weights are trained."
        raise CheckpointError(what, why, "Give the model that they were made from.")
    fix = f"Give one of its runs, such as {runs[0]}." if runs else "Check the path, or train first."
    if foreign:
        fix = f"Convert it first: smedjan convert {path} DST --to neutral."
    raise CheckpointError(f"{path} holds no checkpoint.", f"It has no {MANIFEST}, no step-*/ and no {FINAL}/.", fix)


def is_quantized(directory: Path) -> bool:
    """Whether a directory is of another form, with weights that are quantised (`convert --to quantized`). Never raises."""
    try:
        with open_regular(directory / CONFIG) as file:
            return isinstance(json.loads(file.read(_MOST)).get("quantization"), dict)
    except (CheckpointError, OSError, ValueError, RecursionError, AttributeError):
        return False


_MOST = 16 << 20  # bytes of a config.json


def _holds_any(directory: Path) -> bool:
    return bool(step_directories(directory)) or (standing(directory / FINAL) / MANIFEST).exists()


def _no_directory(path: Path) -> CheckpointError:
    if not path.exists():
        return CheckpointError(f"There is no checkpoint {path}.", beside(path) or "Nothing exists at that path.", "Check the path.")
    where = f"Give the directory: {path.parent}." if (path.parent / MANIFEST).exists() else "Use `convert` for files of other programs."
    return CheckpointError(f"{path} is a file, not a checkpoint.", f"A checkpoint is a directory with {MANIFEST}.", where)


def _read(path: Path, optimizer: bool, verify: bool) -> Checkpoint:
    try:
        return load(path, optimizer=optimizer, verify=verify)
    except CheckpointError as error:
        raise with_offer(path, error, verify) from None


def with_offer(path: Path, error: CheckpointError, verify: bool = False) -> CheckpointError:
    """The same error, with the newest other checkpoint beside `path` as what to do.

    verify: only a good one, whose every byte is read; else a complete one, which is found at once: a path may only be mistyped.
    """
    path = path if path.name not in {"", ".."} else Path(os.path.abspath(path))
    other, kind = latest_checkpoint(path.parent, verify, exclude=path), "good" if verify else "complete"
    if other is None and path.name != FINAL:
        final = path.parent / FINAL
        offer = f"There is no {kind} checkpoint beside it, but {final} has weights." if (final / MANIFEST).exists() else ""
    else:
        offer = f"The newest {kind} checkpoint beside it is {other}." if other else ""
    return CheckpointError(error.what, error.why, " ".join(part for part in (error.fix, offer) if part) or _LAST_RESORT)


_LAST_RESORT = "There is no good checkpoint beside it: restore it from a copy, or start a new run."
