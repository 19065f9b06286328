"""One process at a time trains into a run folder: two would take each other's rows of metrics.jsonl and each other's checkpoints.

The folder itself is locked (flock), so nothing is left behind, and the kernel drops the lock when the process ends, however it ends.
"""

import os
from pathlib import Path

from smedjan_common.errors import CheckpointError
from smedjan_common.reporting.console import say


class RunLock:
    """A context that holds the run folder it took until it ends. `writes`: False (a dry run) takes nothing."""

    def __init__(self, writes: bool = True):
        self.writes = writes
        self._fd: int | None = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def take(self, folder: Path) -> None:
        """Lock `folder` if it exists and is not held already. Raises CheckpointError when another process trains into it.

        Where the system or the file system has no such locks, it says so and goes on.
        """
        if not self.writes or self._fd is not None or not folder.is_dir():
            return
        try:
            import fcntl

            fd = os.open(folder, os.O_RDONLY)
        except (ImportError, OSError):  # a folder that cannot be read is refused where it is read
            return
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
        else:
            self._fd = fd
