"""What commands promise about their outputs: nothing that stands there is replaced without saying so, and never what is being read."""

import glob
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from smedjan_common.errors import CheckpointError, DataError
from smedjan_common.remote.address import is_remote, shown


def token_file_names(path: str | None) -> list[str]:
    """The files that make up a token file."""
    return [] if path is None else [path, f"{path}.json", f"{path}.offsets"] if path else [path]


def check_outputs(outputs: Iterable[str | None], force: bool, inputs: Iterable[str | None] = ()) -> None:
    """Raises DataError for an output without a name, one that is no file, exists, is given twice or is one of the inputs.

    `force`: existing files may be replaced, but never an input. `inputs`: files, directories and globs; two names of one file (links,
    other spellings) are one.
    """
    given = [path for path in outputs if path is not None]
    for path in given:
        _check_place(path)
    if len({os.path.realpath(path) for path in given}) < len(given):
        raise DataError("Two outputs have the same name.", f"They are {', '.join(map(repr, given))}.", "Give each its own name.")
    standing = [path for path in given if os.path.lexists(path)]
    _refuse_inputs(standing, inputs)
    if standing and not force:
        fix = "Choose another name, or replace it with --force."
        raise DataError(f"The output {standing[0]!r} already exists.", "Nothing was changed.", fix)


def check_directory(output: Path, force: bool, inputs: Iterable[str]) -> None:
    """Raises CheckpointError for a checkpoint's directory `output` that stands (without `force`), is an input, holds one or lies in one."""
    for read in inputs:
        if is_or_holds(output.resolve(), Path(read).resolve()):
            raise CheckpointError(f"{output} is, or contains, the input {read}.", "It would be lost.", "Name another --output.")
        if is_or_holds(Path(read).resolve(), output.resolve()):
            raise CheckpointError(f"{output} lies in the input {read}.", "It would become a part of that.", "Name an --output beside it.")
    if os.path.lexists(output) and not (output.is_dir() and not any(output.iterdir())) and not force:
        fix = "Choose another --output, or replace it with --force."
        raise CheckpointError(f"{output} already exists.", "Nothing was changed.", fix)


def is_or_holds(outer: Path, inner: Path) -> bool:
    """Whether two places are the same or one lies in the other; a file system may take other letters for the same name."""
    return any(place == outer or (place.exists() and outer.exists() and place.samefile(outer)) for place in (inner, *inner.parents))


def _check_place(path: str) -> None:
    if not path:
        raise DataError("The name of an output is empty.", "Nothing was written.", "Name a file.")
    if is_remote(path):
        why = "Outputs appear whole or not at all, which a file of this machine can."
        raise DataError(f"The output {shown(path)!r} is an address.", why, "Name a file, and copy it there when it is whole.")
    if os.path.isdir(path):
        raise DataError(f"The output {path!r} is a directory.", "The output must be a file.", "Name a file.")
    if os.path.exists(path) and not os.path.isfile(path):
        raise DataError(f"The output {path!r} is a device or a pipe.", "A file is written here, and takes its place.", "Name a file.")


def _refuse_inputs(standing: list[str], inputs: Iterable[str | None]) -> None:
    """Raises DataError where a file that stands is one of the inputs."""
    files = {mark: path for path in standing if (mark := _mark(path))}
    if not files:
        return
    for read in _files(inputs):
        mark = _mark(read)
        if mark in files:
            what = f"The output {files[mark]!r} is the input {read!r}."
            raise DataError(what, "Writing it would destroy what is read.", "Choose another name; --force does not help.")


def _files(inputs: Iterable[str | None]) -> Iterator[str]:
    """Every file that the inputs name or hold."""
    for given in filter(None, inputs):
        if is_remote(given):
            continue
        for name in [given] if os.path.exists(given) else glob.glob(given, recursive=True):
            if not os.path.isdir(name):
                yield name
                continue
            for place, _, names in os.walk(name):
                yield from (os.path.join(place, file) for file in names)


def _mark(path: str) -> tuple[int, int] | None:
    """What is the same for all names of a file."""
    try:
        state = os.stat(path)
    except OSError:
        return None
    return (state.st_dev, state.st_ino) if stat.S_ISREG(state.st_mode) else None
