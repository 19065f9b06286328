"""The hidden names of what is being written, whether its writer lives, and the one sweep of what dead writers left.

    .tmp-NAME-PID@HOST-RANDOM    a file or directory being written, or left by a writer that was killed
    .part-NAME-PID@HOST-RANDOM   a file that a journal may go on with: the sweep leaves it to the journal (remove_parts)
    .old-NAME-PID@HOST-RANDOM    a replaced directory, for an instant, where a file system cannot swap two names
    .trash-NAME-PID@HOST-RANDOM  a directory being removed

A process number says something on its own host alone, so the name has the host; and after a restart another process may have the
number, so writers of directories and of parts hold a lock (flock), which the kernel drops when they end, however they end.
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

LOCK_NAME = ".writer"  # in a temporary directory
_HIDDEN = re.compile(r"\.(?P<kind>tmp|part|old|trash)-(?P<name>[^/\0]+)-(?P<pid>\d{1,10})(?:@(?P<host>[\w.]+))?-[0-9a-f]{8}", re.ASCII)
_PATIENCE_SECONDS = 600  # what a living process may take between making a name and locking it, or unlocking and renaming
_DAY_SECONDS = 86_400  # what a file of another host without a lock must be untouched for


class Hidden(NamedTuple):
    """What a hidden name says: kind, the name that is written, and who writes it."""

    kind: str
    name: str
    pid: int
    host: str


def host_name() -> str:
    """This machine's name, in letters that a file's name and a pattern may have."""
    return re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())[:24] or "_"


def hidden(kind: str, path: Path) -> Path:
    """A hidden name beside `path` that nobody else has."""
    return path.with_name(f".{kind}-{path.name}-{os.getpid()}@{host_name()}-{secrets.token_hex(4)}")


def parse(name: str) -> Hidden | None:
    """What a hidden name says; None for any other. A name without a host (of an older smedjan) counts as this host's."""
    match = _HIDDEN.fullmatch(name)
    return Hidden(match["kind"], match["name"], int(match["pid"]), match["host"] or host_name()) if match else None


def is_alive(pid: int) -> bool:
    """Whether a process of this host runs, of whichever user."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # not ours to signal: another user's
        return True
    return True


def lock(fd: int, *, wait: bool = False) -> bool | None:
    """True: locked. False: another process holds the lock. None: this file system has no such locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def remove(path: Path) -> None:
    """Remove a file or directory (or a link to one) so that no half of it ever stands under its name. Raises OSError."""
    trash = path if path.name.startswith(".") else hidden("trash", path)
    if trash != path:
        path.rename(trash)
    if trash.is_symlink() or not trash.is_dir():
        trash.unlink(missing_ok=True)
    else:
        shutil.rmtree(trash, ignore_errors=True)


def remove_leftovers(directory: Path) -> None:
    """Remove what writers that are dead left in `directory`; put back what they had moved aside. Never raises for what it cannot."""
    for path, found in _scan(directory):
        with contextlib.suppress(OSError):
            if found.kind == "part":
                continue
            if found.kind == "old" and not os.path.lexists(directory / found.name):
                if is_dead(path, found):
                    path.rename(directory / found.name)
            elif found.kind != "tmp" or is_dead(path, found):
                remove(path)


def remove_parts(target: Path, keep: Collection[Path] = ()) -> None:
    """Remove the parts of `target` that writers that are dead left, but those to go on with. Never raises for what it cannot."""
    for path, found in _scan(target.parent):
        if (found.kind, found.name) == ("part", target.name) and path not in keep:
            remove_part(path)


def remove_part(path: Path) -> None:
    """Remove a part whose writer is dead; nothing else, whatever it is. Never raises for what it cannot."""
    found = parse(path.name)
    with contextlib.suppress(OSError):
        if found and found.kind == "part" and is_dead(path, found):
            path.unlink(missing_ok=True)


def replaced_names(directory: Path) -> dict[str, Path]:
    """name -> where it stands for now: directories moved aside by a writer that was killed before the new one was in place."""
    return {found.name: path for path, found in _scan(directory) if found.kind == "old" and not os.path.lexists(directory / found.name)}


def is_dead(path: Path, writer: Hidden) -> bool:
    """Whether the writer of a hidden file or directory is gone. Raises OSError.

    Who holds its lock lives. Without one, on this host: the process is gone, or it had the time to take the lock and another process
    has its number. On another host its number says nothing here: then the file must have been left alone for long.
    """
    locked, has_lock = _try(path, writer.kind)
    if locked is False:
        return False
    idle = time.time() - _last_change(path, writer.kind)
    if writer.host != host_name():
        return idle > (_PATIENCE_SECONDS if locked else _DAY_SECONDS)
    must_lock = writer.kind == "part" or (writer.kind == "tmp" and path.is_dir())
    reused = must_lock and (locked or not has_lock) and idle > _PATIENCE_SECONDS
    return not is_alive(writer.pid) or reused


def _try(path: Path, kind: str) -> tuple[bool | None, bool]:
    """What `lock` says of the writer's lock, None where there is none to try; and whether there is one."""
    place = path / LOCK_NAME if path.is_dir() else path
    if kind not in ("tmp", "part") or (kind == "tmp" and place == path):
        return None, False
    with contextlib.suppress(FileNotFoundError), open(place, "rb+") as file:
        return lock(file.fileno()), True
    return None, False


def _last_change(path: Path, kind: str) -> float:
    """Seconds since 1970. A name that was moved aside keeps its times but for ctime."""
    if kind == "old":
        return path.lstat().st_ctime
    inside = list(path.iterdir()) if path.is_dir() and not path.is_symlink() else []
    return max(place.lstat().st_mtime for place in (path, *inside))


def _scan(directory: Path) -> list[tuple[Path, Hidden]]:
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return []
    return [(directory / name, found) for name in names if (found := parse(name))]
