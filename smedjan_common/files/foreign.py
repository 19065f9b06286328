"""Folders of other programs: nothing is written among files that smedjan did not write."""

from collections.abc import Callable
from pathlib import Path

from smedjan_common.errors import ForeignFolderError, some


def foreign_names(folder: Path, ours: Callable[[Path], bool]) -> list[str]:
    """Sorted names of what lies in `folder` and `ours` does not know; none where there is no folder. Raises OSError.

    Names that begin with a dot do not count: .DS_Store, .gitignore, and what an interrupted writer left.
    """
    if not folder.exists():
        return []
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith(".") and not ours(path))


def refuse_foreign(folder: Path, ours: Callable[[Path], bool], kind: str, fix: str) -> None:
    """Raises ForeignFolderError, naming what is in the way, unless all of `folder` is `ours` (foreign_names).

    kind: what the folder would be, "a run of smedjan", say. fix: what to do. Raises OSError for what is no folder.
    """
    if names := foreign_names(folder, ours):
        raise ForeignFolderError(
            f"{folder} is not {kind}, and not empty: it holds {some(names)}.",
            "Nothing is written among the files of another program.",
            fix,
        )
