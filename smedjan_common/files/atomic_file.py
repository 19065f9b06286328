"""Writing files so that a reader sees the old one or the whole new one, never half: temporary name beside it, sync, rename."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from smedjan_common.files.durable import sync, sync_directory
from smedjan_common.files.leftovers import hidden, remove_leftovers


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Replace the file's content. Raises OSError; then nothing is left behind."""
    with atomic_file(path) as file:
        file.write(content)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A binary file that takes its name when the block ends without an error, and vanishes otherwise."""
    with atomic_path(path) as temporary, open(temporary, "xb") as file:
        yield file


def name_target(error: BaseException, temporary: Path, target: Path) -> None:
    """Give an error of writing the name that its reader knows: it has the hidden one, or of a full disk none."""
    if isinstance(error, OSError) and (error.filename == str(temporary) or (error.filename is None and error.errno in _FULL)):
        error.filename = str(target)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """A path beside `path` to write a file at; it becomes `path` when the block ends, and vanishes when it raises.

    What killed writers left in that directory is swept first.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    temporary = hidden("tmp", path)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            sync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):  # on a disk that is read only it says so even of what is not there
            temporary.unlink(missing_ok=True)
        name_target(error, temporary, path)
        raise
