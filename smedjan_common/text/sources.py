"""Which inputs there are: files, directories, globs, addresses and Hugging Face datasets, each with how it is read.

What a directory holds beside text is left out and told with counts; what is named itself and is no text is refused. An input that can be
read only once (a pipe, a FIFO, /dev/stdin) has no size, and its kind shows when it is read.
"""

import glob
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from smedjan_common.errors import DataError, notice, some
from smedjan_common.nearby import beside
from smedjan_common.remote.address import HTTP, Address, is_remote, scheme_of
from smedjan_common.text.compressed import COMPRESSED
from smedjan_common.text.kinds import UTF16, kind_of, refuse

DATASET_PREFIX = "hf:"
UNKNOWN_SIZE = 1 << 40  # bytes; taken for datasets and pipes where it matters whether there is much to do


@dataclass(frozen=True)
class Source:
    """One input. `kind`: a key of READERS; `size`: bytes on disk, 0 where that is not known; `once`: a pipe, read from front to end;
    `mark`: of an address, what changes with its content."""

    path: Path | Address
    kind: str
    size: int
    once: bool = False
    mark: str = ""

    @property
    def place(self) -> str:
        """The name that `find` takes, with all that an address has."""
        return os.fspath(self.path)


def find(inputs: Iterable[str | os.PathLike], flag: str = "--input", field: str = "text") -> list[Source]:
    """The files that `inputs` (files, directories, globs, addresses, hf:NAME[:CONFIG[:SPLIT]] for datasets) name, sorted, each once.

    Raises DataError, which names the `flag` of the inputs, for what is not there or is no text with `field`. A directory gives all its
    files of text, hidden ones left out without a word and all others with a notice; so are files that are named again.
    """
    found: dict[str, Source] = {}
    again: dict[str, Source] = {}
    for given in inputs:
        name = os.fspath(given)
        if name.startswith(DATASET_PREFIX):
            (again if name in found else found)[name] = Source(Path(name), "dataset", 0)
            continue
        if is_remote(name):
            for source in _remote(name, field):
                (again if source.place in found else found)[source.place] = source
            continue
        path = Path(name)
        if path.is_dir():
            files = _below(path, field)
        elif path.exists():
            files = [_source(path, field)]
        else:
            files = [_source(Path(match), field) for match in sorted(glob.glob(name, recursive=True)) if not os.path.isdir(match)]
        if not files:
            what = f"There is no text in {name!r}." if path.exists() else f"There is no input {name!r}."
            why = "" if path.exists() or glob.has_magic(name) else beside(path)
            raise DataError(what, why, f"Check the path; {flag} takes files, directories and quoted globs.")
        for source in files:
            place = os.path.abspath(source.path)
            (again if place in found else found)[place] = source
    if not found:
        raise DataError("No input was given.", "", f"Give {flag} with one or more files, directories or globs.")
    if again:
        notice(f"{flag} names more than once, and it is read once: {some([str(source.path) for source in again.values()])}.")
    return sorted(found.values(), key=lambda source: str(source.path))


def total_size(found: Iterable[Source]) -> int:
    """Bytes on disk of all inputs that have a size."""
    return sum(source.size for source in found)


def much(found: Iterable[Source]) -> int:
    """The same, an input of unknown size counting as a large one."""
    return sum(source.size or (UNKNOWN_SIZE if source.kind == "dataset" or source.once else 0) for source in found)


def refuse_pipes(found: Iterable[Source], why: str) -> None:
    """Raises DataError for an input that can be read only once, where it is needed twice: `why`."""
    for source in found:
        if source.once:
            raise DataError(f"The input {str(source.path)!r} can be read only once.", why, "Write it to a file first, and give the file.")


def refuse_addresses(found: Iterable[Source], flag: str, fix: str) -> None:
    """Raises DataError for an input at an address, where its content is to be known by a hash before it is read."""
    for source in found:
        if isinstance(source.path, Address):
            raise DataError(f"{flag} takes no text at {source.path}.", "A run knows its texts by the hashes of their files.", fix)


def _source(path: Path, field: str) -> Source:
    """A file that was named itself."""
    state = path.stat()
    if not stat.S_ISREG(state.st_mode) or os.path.abspath(path).startswith("/dev/"):  # /dev/fd/3 of a file keeps its place on some systems
        return Source(path, "pipe", 0, once=True)
    kind = kind_of(path, field)
    if kind.why_not:
        raise refuse(path, kind.why_not)
    return Source(path, kind.name, state.st_size)


def _remote(name: str, field: str) -> list[Source]:
    """What an address names: an object, all of them below a folder, or those that its wildcards match. Raises DataError."""
    from smedjan_common.remote.store import Place

    address, place = Address(name), Place(name)
    is_web = scheme_of(name) in HTTP  # which has no folders
    if is_web or not (glob.has_magic(name) or place.stat_if_there() is None):
        kind, stat = kind_of(address, field), place.stat()
        if kind.why_not:
            raise refuse(address, kind.why_not)
        return [Source(address, kind.name, stat.size or 0, mark=stat.mark)]
    if glob.has_magic(name):
        found = [(one, Place(one).stat()) for one in place.matches()]
    else:
        found = [(address / one, stat) for one, stat in place.files().items() if "/." not in f"/{one}"]
    files, left_out = [], Counter()
    for one, stat in found:
        kind = kind_of(one, field)
        if kind.why_not:
            left_out[f"{one.suffix.lower() or one.name} ({kind.why_not[0]})"] += 1
        else:
            files.append(Source(one, kind.name, stat.size or 0, mark=stat.mark))
    _tell_left_out(str(address), left_out)
    if not files:
        raise DataError(f"There is no text at {str(address)!r}.", "", "Check the address; an object, a folder and wildcards are taken.")
    return files


def _below(folder: Path, field: str) -> list[Source]:
    """The files of text below a folder, in order; the others are told."""
    files, left_out = [], Counter()
    for path in _walk(folder, left_out):
        kind = None if (reason := _unusable(path)) else kind_of(path, field)
        if kind and kind.why_not:
            reason = f"{path.suffix.lower() or path.name} ({kind.why_not[0]})"
        if reason:
            left_out[reason] += 1
        elif kind:
            files.append(Source(path, kind.name, path.stat().st_size))
    _tell_left_out(str(folder), left_out)
    return files


def _tell_left_out(folder: str, left_out: Counter) -> None:
    if left_out:
        counts = ", ".join(f"{count} × {what}" for what, count in sorted(left_out.items()))
        notice(f"left out of {folder!r}: {counts}.")


def _walk(folder: Path, left_out: Counter) -> Iterator[Path]:
    """All files below a folder but hidden ones, in order. Raises OSError for a folder that cannot be read."""

    def fail(error: OSError) -> None:
        raise error

    found = []
    for place, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        left_out["linked folder"] += sum(os.path.islink(os.path.join(place, name)) for name in folders)
        found += [Path(place, name) for name in names if not name.startswith(".")]
    left_out += Counter()  # without zeros
    yield from sorted(found)


def _unusable(path: Path) -> str:
    """Why a file of a directory is no text, from what it is and its first bytes; empty where nothing speaks against it."""
    if not path.exists():
        return "dangling link"
    if not path.is_file():
        return "pipe or device"
    if path.suffix.lower() in (*COMPRESSED, ".parquet"):
        return ""
    with open(path, "rb", buffering=0) as file:
        head = file.read(4096)
    if head.startswith(UTF16):
        return "UTF-16 (convert it to UTF-8)"
    return "binary" if b"\0" in head else ""
