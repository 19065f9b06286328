"""A run's directory of checkpoints: which are there, which is the newest good one, which may go.

CHECKPOINT_DIR/step-00001000/   CHECKPOINT_DIR/orbax-00001000/   CHECKPOINT_DIR/final/
"""

from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from smedjan_common.checkpoint.load import load_info, step_of, verify_info
from smedjan_common.checkpoint.manifest import CheckpointInfo
from smedjan_common.errors import CheckpointError, NewerFormatError
from smedjan_common.files.durable import sync_directory
from smedjan_common.files.leftovers import remove, remove_leftovers, replaced_names

OnSkip = Callable[[str], None]


class Found(NamedTuple):
    """A step checkpoint: its step, and its directory."""

    step: int
    path: Path


class Entry(NamedTuple):
    """What has the name of a step checkpoint: what its checkpoint.json says, or why it cannot be used."""

    step: int
    path: Path
    info: CheckpointInfo | None = None
    error: CheckpointError | None = None


def entries(directory: str | Path, *, exclude: Path | None = None) -> list[Entry]:
    """All that have the name of a step checkpoint, oldest first; checkpoint.json and sizes are checked, hashes are not. Never raises.

    `exclude`, under whatever name, is not read.
    """
    known = exclude and exclude.resolve()
    return [_entry(step, path) for step, path in step_directories(Path(directory)) if known is None or path.resolve() != known]


def _entry(step: int, path: Path) -> Entry:
    try:
        return Entry(step, path, load_info(path))
    except CheckpointError as error:
        return Entry(step, path, error=error)


def find_checkpoints(directory: str | Path, *, on_skip: OnSkip | None = None) -> list[Found]:
    """The complete step checkpoints of a run directory, oldest first.

    Complete: checkpoint.json is sound and every file has its size; hashes are not compared. What looks like a checkpoint and is
    not complete is told to `on_skip`, one sentence each. Never raises for what lies in the directory, nor when there is none.
    """
    return [Found(info.step, info.path) for info in _good(directory, on_skip)]


def _good(directory: str | Path, on_skip: OnSkip | None) -> list[CheckpointInfo]:
    found = entries(directory)
    for entry in found:
        if entry.error:
            _tell(on_skip, entry.error)
    return [entry.info for entry in found if entry.info]


def latest_checkpoint(
    directory: str | Path, verify: bool = True, *, on_skip: OnSkip | None = None, exclude: Path | None = None
) -> Path | None:
    """The newest complete step checkpoint whose hashes are right (`verify`: every byte of it is read), or None.

    Broken ones are skipped, and told to `on_skip`. `exclude` is not considered. Never raises for what lies in the directory.
    """
    for info in reversed(_good(directory, on_skip)):
        if info.path == exclude:
            continue
        try:
            if verify:
                verify_info(info)
            return info.path
        except CheckpointError as error:
            _tell(on_skip, error)
    return None


def check_formats(found: Iterable[Entry]) -> None:
    """Raises NewerFormatError for one of these step checkpoints that only a newer smedjan reads.

    It is not broken: a run that went on from an older one would overwrite good work.
    """
    for entry in found:
        if isinstance(entry.error, NewerFormatError):
            fix = "Install a newer smedjan, or give another --checkpoint-dir: a run that went on from an older one would overwrite it."
            raise NewerFormatError(entry.error.what, entry.error.why, fix)


def prune_checkpoints(directory: str | Path, keep: int, *, keep_every: int = 0, spare: Collection[Path] = ()) -> list[Path]:
    """Remove all but the newest `keep` complete step checkpoints (0: remove none); returns what was removed.

    Steps that are multiples of `keep_every` stay too (0: no such rule), and so does what is to `spare`. Broken ones, `final/` and
    everything else are left alone.
    Each is renamed to a dot name first, so none ever stands there half. Raises CheckpointError when the directory cannot be written.
    """
    directory = Path(directory)
    if keep < 0 or keep_every < 0:
        raise CheckpointError(f"--keep {keep} is negative.", "It is a number of checkpoints.", "Take --keep 0 to keep all.")
    doomed = find_checkpoints(directory)[:-keep] if keep else []
    doomed = [path for step, path in doomed if not (keep_every and step % keep_every == 0) and path not in spare]
    try:
        for path in doomed:
            remove(path)
        if doomed:
            sync_directory(directory)
    except OSError as error:
        raise CheckpointError(
            f"An old checkpoint in {directory} cannot be removed.", f"{error.strerror or error}.", "Make the directory writable."
        ) from None
    remove_leftovers(directory)
    return doomed


def step_directories(directory: Path) -> list[Found]:
    """Every directory with the name of a step checkpoint, complete or not, oldest first. Never raises."""
    try:
        places = {path.name: path for path in directory.iterdir()}
    except OSError:
        return []
    places = replaced_names(directory) | places
    steps = ((step_of(name), path) for name, path in places.items())
    return sorted(Found(step, path) for step, path in steps if step is not None and path.is_dir())


def _tell(on_skip: OnSkip | None, error: CheckpointError) -> None:
    if on_skip:
        on_skip(f"{error.what} {error.why}")
