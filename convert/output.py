"""What every writer promises: nothing is overwritten without --force, nothing of other people's ever, and no half stands anywhere."""

import fnmatch
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from smedjan_common.commands.outputs import is_or_holds
from smedjan_common.errors import CheckpointError, some
from smedjan_common.files.foreign import foreign_names

_NOBODYS = (".DS_Store",)  # of names with a dot; any other, .git say, is somebody's work


class Form(Protocol):
    """What a writer makes: whether a path is that, and patterns of the names in it."""

    @property
    def detect(self) -> Callable[[Path], bool]: ...

    @property
    def parts(self) -> tuple[str, ...]: ...


def check_target(source: Path, target: Path, force: bool, form: Form) -> None:
    """Raises CheckpointError when `target` may not be written: it is the source, holds it or lies in it, by whatever spelling; something
    stands there and there is no --force; or what stands there is not all of what a writer of `form` makes."""
    if is_or_holds(target.resolve(), source.resolve()):
        raise CheckpointError(f"{target} is, or contains, the source.", "It would be lost.", "Name another destination.")
    if is_or_holds(source.resolve(), target.resolve()):
        raise CheckpointError(
            f"{target} lies in what is to be converted, {source}.", "It would become a part of that.", "Name a destination beside it."
        )
    if not os.path.lexists(target) or (target.is_dir() and not any(target.iterdir())):
        return
    if not force:
        raise CheckpointError(
            f"{target} already exists.", "Nothing was changed.", "Choose another destination, or replace it with --force."
        )
    if not form.detect(target):
        raise CheckpointError(f"{target} is in the way and is not something that `convert` writes.", "", "Move it elsewhere.")
    if target.is_dir() and (names := _not_of(form, target)):
        raise CheckpointError(
            f"{target} is in the way: it holds {some(names)}, which `convert` does not write.",
            "It would be lost with the rest.",
            "Move it elsewhere.",
        )


def _not_of(form: Form, target: Path) -> list[str]:
    """What lies in `target` and no writer of `form` makes."""

    def known(path: Path) -> bool:
        return any(fnmatch.fnmatchcase(path.name, part) for part in form.parts)

    hidden = [path.name for path in target.iterdir() if path.name.startswith(".") and path.name not in _NOBODYS]
    return sorted(hidden) + foreign_names(target, known)
