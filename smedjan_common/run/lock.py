"""One process at a time trains into a run folder: two would take each other's rows of metrics.jsonl and each other's checkpoints.

The folder itself is locked (flock), so nothing is left behind, and the kernel drops the lock when the process ends, however it ends.
It is made and locked before anything is decided: of two starts on a folder that is not there yet, the slower one is refused, or
finds the run of the faster.
"""

import contextlib
import fcntl
import os
from pathlib import Path

from smedjan_common.errors import CheckpointError
from smedjan_common.reporting.console import say


class RunLock:
    """A context that holds the run folder it took until it ends. `writes`: False (a dry run) takes and makes nothing."""

    def __init__(self, writes: bool = True):
        self.writes = writes
        self._fd: int | None = None
        self._made: list[Path] = []

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            for folder in self._made:
                folder.rmdir()  # what was made for a run that was refused is empty; any other stays
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def take(self, folder: Path) -> None:
        """Make `folder` and lock it. Raises CheckpointError when another process trains into it, OSError when it cannot be made.

        Where the system or the file system has no such locks, it says so and goes on.
        """
        _refuse_file(folder)
        while self.writes and self._fd is None:
            self._made = [*_make(folder), *self._made]
            try:
                fd = _locked(folder)
            except FileNotFoundError:
                continue  # a run that was refused had made it, and removed it meanwhile
            if fd is None:
                return
            if _is_at(fd, folder):
                self._fd = fd
            else:
                os.close(fd)


def _refuse_file(folder: Path) -> None:
    """Raises CheckpointError where a file, or a link to nothing, stands at the place of the folder or of one above it."""
    for path in (folder, *folder.parents):
        if os.path.lexists(path) and not path.is_dir():
            what = "a link to nothing" if path.is_symlink() and not path.exists() else "not a folder"
            raise CheckpointError(f"{path} is {what}.", "A run lives in a folder of its own.", "Give another --checkpoint-dir.")


def _make(folder: Path) -> list[Path]:
    """Make a folder and those above it; returns what was not there, the deepest first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _locked(folder: Path) -> int | None:
    """A descriptor that holds the lock; None where there are no locks. Raises CheckpointError when it is held, FileNotFoundError."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder that cannot be read is refused where it is read
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise CheckpointError(
            f"Another process is training into {folder}.",
            "Two would overwrite each other's metrics and checkpoints.",
            "Stop it (Ctrl-C saves), or give another --checkpoint-dir.",
        ) from None
    except OSError:  # NFS, say
        os.close(fd)
        say(f"note: {folder} cannot be locked here: do not train into it twice at once.")
        return None
    return fd


def _is_at(fd: int, folder: Path) -> bool:
    """Whether the open folder still has its name."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), os.stat(folder))
    return False
