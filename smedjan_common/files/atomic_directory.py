"""A directory appears whole or not at all, whatever kills the writer: `with atomic_directory(target) as temporary`.

    .tmp-NAME-PID-RANDOM    being written, or left by a writer that was killed
    .old-NAME-PID-RANDOM    the replaced one, for an instant, where a file system cannot swap two names
    .trash-NAME-PID-RANDOM  being removed

Files and directories are fsynced before the rename and the parent after it, so the order also holds over a power cut.
A writer holds a lock on a file in its temporary directory; the kernel drops it when the process ends, however it ends.
What a dead writer left is removed, or put back, by the next one.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

LOCK_NAME = ".writer"
_LEFTOVER = re.compile(r"\.(?P<kind>tmp|old|trash)-(?P<name>.+)-(?P<pid>\d+)-[0-9a-f]{8}")
_PATIENCE_SECONDS = 600  # what a living process may take between making the directory and locking, or unlocking and renaming


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Yields a temporary directory beside `target` to write into; it becomes `target`, replacing one, when the block ends.

    If the block raises, the temporary directory is removed and `target` is as it was. Raises OSError.
    """
    _make_parents(target.parent)
    remove_leftovers(target.parent)
    temporary = _hidden("tmp", target)
    try:
        temporary.mkdir()
        with _locked(temporary / LOCK_NAME):
            yield temporary
            fsync_directory(temporary)
            (temporary / LOCK_NAME).unlink()  # the last thing before the rename: without it the process id alone protects
            replaced = _replace(temporary, target)
            fsync_directory(target.parent)
        if replaced:
            remove(replaced)
    except BaseException:
        for seconds in (0.0, 0.05, 0.2, 1.0):  # again where a thread of the writer was still making files
            time.sleep(seconds)
            shutil.rmtree(temporary, ignore_errors=True)
            if not temporary.exists():
                break
        raise


def remove(path: Path) -> None:
    """Remove a directory (or a link to one) so that no half of it ever stands under its name. Raises OSError."""
    trash = path if path.name.startswith(".") else _hidden("trash", path)
    if trash != path:
        path.rename(trash)
    if trash.is_symlink() or not trash.is_dir():
        trash.unlink(missing_ok=True)
    else:
        shutil.rmtree(trash, ignore_errors=True)


def remove_leftovers(directory: Path) -> None:
    """Remove what writers that are dead left behind; put back what they had moved aside. Never raises for what it cannot."""
    for path in _scan(directory):
        match = _LEFTOVER.fullmatch(path.name)
        with contextlib.suppress(OSError):
            if not match:
                continue
            if match["kind"] == "old" and not os.path.lexists(directory / match["name"]):
                if not _alive(int(match["pid"])):
                    path.rename(directory / match["name"])
            elif match["kind"] != "tmp" or _is_dead(path, int(match["pid"])):
                remove(path)


def replaced_names(directory: Path) -> dict[str, Path]:
    """name -> where it stands for now: directories moved aside by a writer that was killed before the new one was in place."""
    matches = ((path, _LEFTOVER.fullmatch(path.name)) for path in _scan(directory))
    return {m["name"]: path for path, m in matches if m and m["kind"] == "old" and not os.path.lexists(directory / m["name"])}


def standing(path: Path) -> Path:
    """Where a directory stands: `path`, or the name it was moved aside to by a writer that was killed at that instant."""
    return path if os.path.lexists(path) else replaced_names(path.parent).get(path.name, path)


def fsync_directory(path: Path) -> None:
    """Make the entries of a directory durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:  # some network file systems refuse it on directories and need none
        if error.errno not in {errno.EINVAL, errno.ENOTSUP, errno.EBADF}:
            raise
    finally:
        os.close(fd)


def _make_parents(directory: Path) -> None:
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    for path in missing:
        fsync_directory(path.parent)


def _hidden(kind: str, path: Path) -> Path:
    return path.with_name(f".{kind}-{path.name}-{os.getpid()}-{secrets.token_hex(4)}")


def _scan(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "xb") as file:
        _lock(file.fileno(), wait=True)  # a cleaner may be trying it just now
        yield


def _lock(fd: int, *, wait: bool = False) -> bool | None:
    """True: locked. False: another process holds the lock. None: this system or file system has no such locks."""
    try:
        import fcntl

        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def _is_dead(temporary: Path, pid: int) -> bool:
    """Whether the writer of a temporary directory is gone: it holds no lock, and its process is gone or had the time to take one.

    Its process id alone would not do: after a restart another process may have it.
    """
    locked = None
    with contextlib.suppress(FileNotFoundError), open(temporary / LOCK_NAME, "rb+") as file:
        locked = _lock(file.fileno())
        if locked is None:  # no locks here: the process id is all there is
            return not _alive(pid)
    return locked is not False and (not _alive(pid) or time.time() - temporary.stat().st_mtime > _PATIENCE_SECONDS)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


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
        aside = _hidden("old", target)
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
