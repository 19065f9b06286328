"""The one `sync`: what was written is on the drive when it returns, so that an order of writes also holds over a power cut."""

import errno
import fcntl
import os
from pathlib import Path

_NOT_THERE = {errno.EINVAL, errno.ENOTSUP, errno.ENOTTY, errno.EBADF}  # some network file systems refuse it and need none


def sync(fd: int) -> None:
    """Make the content of an open file durable. Raises OSError.

    On macOS fsync(2) stops at the cache of the drive; F_FULLFSYNC goes through it, where the file system has it.
    """
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        try:
            fcntl.fcntl(fd, full)
            return
        except OSError as error:
            if error.errno not in _NOT_THERE:
                raise
    os.fsync(fd)


def sync_directory(path: Path) -> None:
    """Make the entries of a directory durable: a rename, a new file. Raises OSError."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except PermissionError:  # one may write into a directory that one may not read
        return
    try:
        sync(fd)
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
    finally:
        os.close(fd)
