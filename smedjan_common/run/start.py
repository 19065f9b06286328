"""How a run begins, decided once, when its folder is locked: anew, from a step checkpoint, or anew from weights."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smedjan_common.checkpoint import CheckpointInfo, check_readable, newest, read_info
from smedjan_common.checkpoint.directory import Entry, check_formats, entries
from smedjan_common.checkpoint.pulled import checkpoint_here
from smedjan_common.errors import CheckpointError
from smedjan_common.files.names import CONFIG, FINAL
from smedjan_common.reporting.metrics import read_rows
from smedjan_common.run.asked import Asked
from smedjan_common.run.folder import read_config
from smedjan_common.run.recorded import check_recorded, is_dataset

Say = Callable[[str], object]


@dataclass(frozen=True)
class New:
    """A run from initial values."""


@dataclass(frozen=True)
class GoOn:
    """The run of a step checkpoint goes on. `recorded`: what config.json beside it says, or where it is gone, the checkpoint."""

    info: CheckpointInfo
    recorded: dict[str, Any]

    @property
    def folder(self) -> Path:
        """The run folder of the checkpoint, which need not be the one that is written into."""
        return self.info.path.parent


@dataclass(frozen=True)
class Pretrained:
    """A new run from weights: new optimizer, step 0."""

    info: CheckpointInfo


Begin = New | GoOn | Pretrained


def find_begin(folder: Path, asked: Asked, backend: str, say: Say, damaged: Collection[Path] = ()) -> Begin:
    """How the run in `folder` begins. Raises CheckpointError rather than overwrite a run, or for one that `backend` does not read.

    damaged: checkpoints that turned out not to be whole when they were read. Their hashes are compared then, not here.
    """
    info = _step_checkpoint(folder, asked.value("resume"), say, damaged)
    weights = newest(checkpoint_here(asked.value("pretrained"))) if asked.value("pretrained") and info is None else None
    if found := info or weights:
        check_readable(found, backend)
    if info and info.step == 0 and not info.optimizer and not info.train:
        return Pretrained(info)  # a folder that `smedjan grow` began: there are weights, and no run yet
    if info:
        return GoOn(info, _recorded(info, say))
    return Pretrained(weights) if weights else New()


def _step_checkpoint(folder: Path, resume: str, say: Say, damaged: Collection[Path]) -> CheckpointInfo | None:
    if resume == "never":
        return _refuse_a_run(folder)
    if resume == "auto":
        return _newest_step(folder, say, damaged)
    info = read_info(checkpoint_here(resume, step=True))
    inside = info.path.resolve().parent == folder.resolve()
    others = entries(folder, exclude=info.path)
    check_formats([entry for entry in others if not inside or entry.step > info.step])
    if newer := [entry for entry in others if entry.info and (entry.step > info.step or not inside)]:
        raise CheckpointError(
            f"{folder} has checkpoints that {info.path} would not go on from, such as {newer[-1].path.name}.",
            "They would mix with those of this run.",
            "Give another --checkpoint-dir, or move them away.",
        )
    return replace(info, path=folder / info.path.name) if inside else info


def _newest_step(folder: Path, say: Say, damaged: Collection[Path]) -> CheckpointInfo | None:
    found = entries(folder)
    broken = [entry for entry in found if entry.error]
    for entry in broken:
        say(f"note: {_told(entry)}")
    good = [entry for entry in found if entry.info and entry.path not in damaged]
    start = good[-1] if good else None
    check_formats([entry for entry in found if start is None or found.index(entry) > found.index(start)])
    if start is None and (broken or damaged):
        raise CheckpointError(
            f"No checkpoint in {folder} can be used.",
            "All of them are damaged.",
            "Give another --checkpoint-dir to start a new run, or restore one from a copy.",
        )
    if start is None and (folder / FINAL).exists():
        raise CheckpointError(
            f"{folder} has a finished run without its step checkpoints.",
            "final/ holds weights only, nothing to go on from, and a new run would overwrite it.",
            f"Give another --checkpoint-dir, or start there from the weights: --pretrained {folder / FINAL} --checkpoint-dir NEW.",
        )
    if start is None and read_rows(folder):
        say(f"note: the run in {folder} ended before its first checkpoint; it starts again.")
    return start.info if start else None


def _recorded(info: CheckpointInfo, say: Say) -> dict[str, Any]:
    folder = info.path.parent
    if (recorded := read_config(folder)) is not None:
        check_recorded(folder / CONFIG, recorded)
        return recorded
    say(f"note: {folder / CONFIG} is missing or not readable: the flags of the run are unknown, and those not given take their defaults.")
    return {"dataset": info.dataset if is_dataset(info.dataset) else None}


def _told(entry: Entry) -> str:
    assert entry.error
    return f"{entry.error.what} {entry.error.why}"


def _refuse_a_run(folder: Path) -> None:
    if entries(folder) or (folder / FINAL).exists() or read_rows(folder):
        raise CheckpointError(
            f"{folder} already has a run.",
            "--resume never starts a new run and overwrites nothing.",
            "Give another --checkpoint-dir, remove this one, or take --resume auto to go on.",
        )
