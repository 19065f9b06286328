"""An object into a file of this machine: hashed as it comes, named when it is whole, gone on with where it was cut.

.NAME.part    what has come so far; its bytes are hashed again when the download goes on, so nothing of it is taken on trust
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from smedjan_common.errors import DataError
from smedjan_common.files.durable import sync, sync_directory
from smedjan_common.files.leftovers import lock
from smedjan_common.remote.reading import open_remote
from smedjan_common.remote.store import Place

_AT_ONCE = 1 << 20
Told = Callable[[int], None]  # bytes that are here


def download(place: Place, target: Path, sha256: str | None, told: Told = lambda done: None) -> None:
    """Write the object as `target`, which is there whole or not at all. sha256: of all of it, where it is known.

    Of two processes that want the same file one waits for the other. Raises DataError for what cannot be read, is of another
    hash, or has no room here; OSError.
    """
    if target.is_file():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    with open(part.with_suffix(".lock"), "ab") as guard:
        lock(guard.fileno(), wait=True)
        if target.is_file():
            return
        has = place.stat().size
        _check_space(place, target.parent, has or 0, part)
        if not (_brought(place, part, sha256, has, told) or _brought(place, part, sha256, has, told)):  # once more, from nothing
            raise DataError(f"{place} is not what was written.", f"Its SHA-256 is not {sha256}. {_HALF}", _SEND, case="damaged")
        os.replace(part, target)
        sync_directory(target.parent)
        part.with_suffix(".lock").unlink(missing_ok=True)


_HALF = "It was replaced, or not sent whole."
_SEND = "Send it to the store again, all files of it."


def _brought(place: Place, part: Path, sha256: str | None, size: int | None, told: Told) -> bool:
    """Bring what is missing; whether the hash is right. Where it is not, the part is removed."""
    digest = hashlib.sha256()
    with open(part, "a+b") as out:
        out.seek(0)
        if size is None or sha256 is None or os.fstat(out.fileno()).st_size > size:
            out.truncate()  # nothing says later whether what is here belongs to what comes
        while data := out.read(_AT_ONCE):
            digest.update(data)
        with open_remote(place.address) as source:
            if out.tell():
                source.seek(out.tell())
            while data := source.read1(_AT_ONCE):  # what has come is kept when the next part fails
                out.write(data)
                digest.update(data)
                told(out.tell())
        out.flush()
        sync(out.fileno())
    if sha256 in (None, digest.hexdigest()):
        return True
    part.unlink()
    return False


def _check_space(place: Place, folder: Path, size: int, part: Path) -> None:
    total, _, free = shutil.disk_usage(folder)
    needed = size - (part.stat().st_size if part.exists() else 0)
    if total and free < needed:  # a total of 0: a file system that tells nothing
        why = f"{needed / 1e9:,.2f} GB are to come, {folder} has room for {free / 1e9:,.2f}."
        raise DataError(f"There is no room for {place}.", why, "Free some space, or name another folder with SMEDJAN_CACHE.")
