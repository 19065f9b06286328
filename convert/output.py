"""What every writer promises: nothing is overwritten without --force, nothing of other people's ever, and no half stands anywhere."""

import os
from collections.abc import Callable
from pathlib import Path

from smedjan_common.errors import CheckpointError


def check_target(source: Path, target: Path, force: bool, ours: Callable[[Path], bool]) -> None:
    """Raises CheckpointError when `target` may not be written. ours(path): whether what stands there is of the format to be written."""
    inside, outside = source.resolve(), target.resolve()
    if inside == outside or inside.is_relative_to(outside):
        raise CheckpointError(f"{target} is, or holds, what is to be converted.", "It would be lost.", "Name another destination.")
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    if not force:
        raise CheckpointError(
            f"{target} exists already.", "Nothing was changed.", "Choose another destination, or replace it with --force."
        )
    if not ours(target):
        raise CheckpointError(f"{target} is in the way and is nothing that `convert` writes here.", "", "Move it elsewhere.")
