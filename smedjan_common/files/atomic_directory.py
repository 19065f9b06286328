"""A directory appears whole or not at all, whatever kills the writer: `with atomic_directory(target) as temporary`.

Files and directories are synced before the rename and the parent after it, so the order also holds over a power cut.
A writer holds a lock on a file in its temporary directory. What a dead writer left is removed, or put back, by the next one
(leftovers.py, which has the names).
"""

import contextlib
import errno
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from smedjan_common.files.atomic_file import name_target
from smedjan_common.files.durable import sync_directory
from smedjan_common.files.leftovers import LOCK_NAME, hidden, lock, remove, remove_leftovers, replaced_names


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yields a temporary directory beside `target` to write into; it becomes `target`, replacing one, when the block ends.

    If the block raises, the temporary directory is removed and `target` is as it was. Raises OSError.
    """
    _make_parents(target.parent)
    remove_leftovers(target.parent)
    temporary = hidden("tmp", target)
    try:
        temporary.mkdir()
        with _locked(temporary / LOCK_NAME):
            yield temporary
            sync_directory(temporary)
            (temporary / LOCK_NAME).unlink()  # the last thing before the rename: without it the process id alone protects
            replaced = _replace(temporary, target)
            sync_directory(target.parent)
        if replaced:
            remove(replaced)
    except BaseException as error:
        name_target(error, temporary, target)
        for seconds in (0.0, 0.05, 0.2, 1.0):  # again where a thread of the writer was still making files
            time.sleep(seconds)
            shutil.rmtree(temporary, ignore_errors=True)
            if not temporary.exists():
                break
        raise


def standing(path: Path) -> Path:
    """Where a directory stands: `path`, or the name it was moved aside to by a writer that was killed at that instant."""
    return path if os.path.lexists(path) else replaced_names(path.parent).get(path.name, path)


def _make_parents(directory: Path) -> None:
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_directory(path.parent)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "xb") as file:
        lock(file.fileno(), wait=True)  # a cleaner may be trying it just now
        yield


def _replace(temporary: Path, target: Path) -> Path | None:
    """Put `temporary` at `target`. Returns where what stood there is now."""
    while True:
        try:
            temporary.rename(target)
            return None
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
                raise
        if _exchange(temporary, target):
            return temporary
        aside = hidden("old", target)
        try:
            target.rename(aside)
        except FileNotFoundError:
            continue
        try:
            temporary.rename(target)
        except OSError as error:
            if not os.path.lexists(target):
                aside.rename(target)
                raise
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise
            remove(aside)  # somebody wrote this name at the same moment: once more
            continue
        return aside


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step, where system and file system can (Linux renameat2, macOS renamex_np)."""
    import ctypes

    libc = ctypes.CDLL(None)
    try:
        if sys.platform == "darwin":
            return libc.renamex_np(os.fsencode(one), os.fsencode(other), 2) == 0  # RENAME_SWAP
        return libc.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), 2) == 0  # AT_FDCWD, RENAME_EXCHANGE
    except AttributeError:
        return False
