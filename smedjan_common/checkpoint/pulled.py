"""What a run at an address has and its folder on this machine lacks: the newest whole checkpoint, and what stands beside it.

A checkpoint comes into .pull-NAME/, each file hashed against checkpoint.json as it comes, and takes its name when all of it is there; one
that broke off goes on from where it was.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from smedjan_common.checkpoint.directory import find_checkpoints
from smedjan_common.checkpoint.load import step_of
from smedjan_common.checkpoint.mirror import Mirror, checkpoints_there, manifest_there
from smedjan_common.data.fetched import bring
from smedjan_common.errors import CheckpointError, DataError, notice
from smedjan_common.files.atomic_file import write_atomically
from smedjan_common.files.durable import sync_directory
from smedjan_common.files.leftovers import remove
from smedjan_common.files.names import CONFIG, DATA, FINAL, GIVEN, MANIFEST, METRICS
from smedjan_common.remote.address import is_remote
from smedjan_common.remote.cache import cache_folder
from smedjan_common.remote.download import download
from smedjan_common.remote.store import Place

_NAME = re.compile(r"(?!\.)[\w.-]+(/(?!\.)[\w.-]+)*", re.ASCII)  # of a file in a checkpoint: nothing that leads out of it
_SCORES = re.compile(r"reference-[0-9a-f]{16}\.npy")
Say = Callable[[str], object]


def pull(mirror: Mirror, say: Say) -> None:
    """Bring the folder to where the run at the address is, where that is further. Raises CheckpointError, DataError, OSError."""
    place, folder = mirror.place, mirror.folder
    there, here = mirror.run_there(), mirror.run_here()
    if there and here and there != here:
        fix = f"Give another --checkpoint-dir, or remove the one that is not wanted: {folder}, or what is at the address."
        raise CheckpointError(f"{folder} is of another run than {place}.", "What was at the address was replaced.", fix)
    steps = [name for name in checkpoints_there(place) if name != FINAL]
    newest = max((step for step, _ in find_checkpoints(folder)), default=-1)
    for name in reversed(steps):
        if (step_of(name) or 0) <= newest:
            break
        if _bring_checkpoint(place, folder, name, say):
            _bring_files(place, folder)
            break
    if there and not here:
        _bring_data(place, folder)
        mirror.keep_run(there)
    for left in folder.glob(".pull-*"):
        shutil.rmtree(left, ignore_errors=True)


def checkpoint_here(path: str | os.PathLike, *, step: bool = False) -> Path:
    """A path of this machine as it is; the checkpoint at an address brought to the cache.

    Of a run that is the newest, final/ where no later step is there; `step`: never final/. Raises CheckpointError, DataError, OSError.
    """
    if not is_remote(path):
        return Path(path)
    place = Place(os.fspath(path))
    if (place / MANIFEST).stat_if_there():
        run, name = Place(place.address.parent), place.address.name
    else:
        run, name = place, _newest(place, step)
    raw = manifest_there(run, name)
    folder = cache_folder("checkpoints") / hashlib.sha256(raw).hexdigest()[:24]
    if not (folder / name / MANIFEST).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        if not _bring_checkpoint(run, folder, name, notice):
            raise CheckpointError(f"{run / name} is damaged.", "It is not what its checkpoint.json says.", "Give another of the run.")
        _bring_files(run, folder)
    return folder / name


def _newest(place: Place, step: bool) -> str:
    there = checkpoints_there(place)
    steps = [name for name in there if name != FINAL]
    if not steps and (step or FINAL not in there):
        raise CheckpointError(f"There is no checkpoint at {place}.", "None there has its checkpoint.json.", "Check the address.")
    if step or FINAL not in there:
        return steps[-1]
    last = step_of(steps[-1]) if steps else -1
    return FINAL if json.loads(manifest_there(place, FINAL)).get("step", 0) >= (last or 0) else steps[-1]


def _bring_checkpoint(place: Place, folder: Path, name: str, say: Say) -> bool:
    """Whether it is here now; one that is not what its checkpoint.json says is told, and left there."""
    target, temporary = folder / name, folder / f".pull-{name}"
    say(f"Bringing {place / name} to {folder}.")
    raw = manifest_there(place, name)
    try:
        listed = {file: record["sha256"] for file, record in json.loads(raw)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        say(f"note: {place / name / MANIFEST} is damaged. The checkpoint is left out.")
        return False
    beside = {file: None for file in (place / name).files() if file != MANIFEST and file not in listed}
    try:
        for file, sha256 in {**beside, **listed}.items():
            if not _NAME.fullmatch(file):
                raise DataError(f"{place / name} has a file {file!r}.", "No checkpoint has.", "Look what it is.", case="damaged")
            download(place / name / file, temporary / file, sha256)
    except DataError as error:
        if error.case not in ("damaged", "absent"):
            raise
        say(f"note: {error.what} {error.why} The checkpoint is left out.")
        shutil.rmtree(temporary, ignore_errors=True)
        return False
    write_atomically(temporary / MANIFEST, raw)
    for left in temporary.rglob(".*"):
        left.unlink()
    if os.path.lexists(target):
        remove(target)
    os.replace(temporary, target)
    sync_directory(folder)
    return True


def _bring_files(place: Place, folder: Path) -> None:
    there = place.files()
    for name in (CONFIG, GIVEN, METRICS):
        if name in there:
            write_atomically(folder / name, (place / name).read_all())


def _bring_data(place: Place, folder: Path) -> None:
    """The token files that the run made of its texts, and what the reference of pairs gave to theirs."""
    for name in (place / DATA).files():
        if _SCORES.fullmatch(name):
            download(place / DATA / name, folder / DATA / name, None)  # the run knows its hash
        if name.endswith(".bin.json") and _NAME.fullmatch(name):
            manifest = place / DATA / name
            file = Place(type(manifest.address)(manifest.address.url.removesuffix(".json")))
            bring(file, manifest.read_all(), folder / DATA / name.removesuffix(".json"))
