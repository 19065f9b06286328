"""Reading small files that smedjan wrote, in places where anything may stand by now."""

import errno
import os
import stat
from pathlib import Path


def read_regular(path: str | os.PathLike) -> bytes:
    """The content of a file or of what a link leads to. Raises OSError, also for a pipe or a device, which could be waited for forever."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", str(Path(path)))
        with open(fd, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(fd)
