"""Where a run starts: the step checkpoint it goes on from, or none."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from smedjan_common.checkpoint import find_checkpoints, latest_checkpoint, read_info, verify_checkpoint
from smedjan_common.checkpoint.directory import check_formats
from smedjan_common.errors import CheckpointError
from smedjan_common.files.names import FINAL
from smedjan_common.reporting.metrics import read_rows

if TYPE_CHECKING:
    pass


def find_start(folder: Path, resume: str, say: Callable[[str], None]) -> Path | None:
    """The step checkpoint to go on from, its hashes verified; None for a new run. Raises CheckpointError rather than overwrite a run."""
    if resume == "never":
        return _refuse_a_run(folder)
    if resume == "auto":
        return _newest(folder, say)
    info = read_info(resume)
    verify_checkpoint(info.path)
    others = [found for found in find_checkpoints(folder) if found.path.resolve() != info.path.resolve()]
    inside = info.path.resolve().parent == folder.resolve()
    check_formats(folder, info.path if inside else None)
    if newer := [found for found in others if found.step > info.step or not inside]:
        raise CheckpointError(
            f"{folder} has checkpoints that {info.path} would not go on from, such as {newer[-1].path.name}.",
            "They would mix with those of this run.",
            "Give another --checkpoint-dir, or move them away.",
        )
    return folder / info.path.name if inside else info.path


def _newest(folder: Path, say: Callable[[str], None]) -> Path | None:
    broken: list[str] = []
    start = latest_checkpoint(folder, on_skip=broken.append)
    for line in broken:
        say(f"note: {line}")
    check_formats(folder, start)
    if start is None and broken:
        raise CheckpointError(
            f"No checkpoint in {folder} can be used.",
            "All of them are damaged.",
            "Give another --checkpoint-dir to start anew, or restore one from a copy.",
        )
    if start is None and (folder / FINAL).exists():
        raise CheckpointError(
            f"{folder} has a finished run without its step checkpoints.",
            "final/ holds weights only, nothing to go on from, and a new run would overwrite it.",
            f"Give another --checkpoint-dir, or start there from the weights: --pretrained {folder / 'final'} --checkpoint-dir NEW.",
        )
    if start is None and read_rows(folder):
        say(f"note: the run in {folder} ended before its first checkpoint; it starts again.")
    return start


def _refuse_a_run(folder: Path) -> None:
    broken: list[str] = []
    if find_checkpoints(folder, on_skip=broken.append) or broken or (folder / FINAL).exists() or read_rows(folder):
        raise CheckpointError(
            f"{folder} already has a run.",
            "--resume never starts anew and overwrites nothing.",
            "Give another --checkpoint-dir, remove this one, or take --resume auto to go on.",
        )
