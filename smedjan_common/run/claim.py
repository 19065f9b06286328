"""Whether a folder is for a run to write into: one that is not there, an empty one, or a run's. Any other is another program's."""

import re
from pathlib import Path

from smedjan_common.checkpoint.directory import step_directories
from smedjan_common.files.foreign import refuse_foreign
from smedjan_common.files.names import CONFIG, DATA, FINAL, GIVEN, MANIFEST, METRICS, PLOT, QUICKSTART, SAMPLES, TOKENIZER
from smedjan_common.run.asked import Asked
from smedjan_common.run.folder import read_config

_KEY = re.compile(r"[0-9a-f]{16}|reference-[0-9a-f]{16}\.(npy|part)")  # in DATA: of texts (run.data), of pairs (run.reference_scores)
_WRITTEN = {CONFIG, GIVEN, METRICS, PLOT, SAMPLES, FINAL}


def check_folder(folder: Path, asked: Asked | None = None) -> None:
    """Raises ForeignFolderError, naming what is in the way, for a folder that holds anything and is of no run.

    What the run reads may lie in it: no run overwrites that. Names with a dot at their beginning and the data of a run that ended
    before its first step do not count. Raises OSError.
    """
    if is_run(folder):
        return
    inputs = [_absolute(name) for name in _reads(asked)] if asked else []
    refuse_foreign(
        folder,
        lambda path: _is_data(path) or any(_belongs(path, given) for given in inputs),
        "a run of smedjan",
        "Give another --checkpoint-dir: a new folder, an empty one, or that of a run.",
    )


def is_run(folder: Path) -> bool:
    """Whether smedjan trained into it: its config.json says so, or where that is gone or broken, a checkpoint in it."""
    if (config := read_config(folder)) is not None:
        return isinstance(versions := config.get("versions"), dict) and "smedjan" in versions
    places = [path for _, path in step_directories(folder)] + [folder / FINAL]
    return any((path / MANIFEST).is_file() for path in places)


def _is_data(path: Path) -> bool:
    if path.name != DATA or not path.is_dir():
        return False
    names = [entry.name for entry in path.iterdir() if not entry.name.startswith(".")]
    return all(_KEY.fullmatch(name) or name == QUICKSTART for name in names)


def _reads(asked: Asked) -> list[str]:
    return [*asked.value("dataset"), *asked.value("val_dataset"), *filter(None, (asked.value("tokenizer"),))]


def _absolute(name: str) -> Path:
    return Path(re.sub(r"(\.bin):[^/:]*$", r"\1", name)).resolve()  # PATH.bin:WEIGHT


def _belongs(path: Path, given: Path) -> bool:
    """Whether `path` is what was given, holds it, or stands beside it: train.bin.json, the tokenizer of a token file."""
    path = path.resolve()
    tokenizer = given.suffix == ".bin" and path.name in {TOKENIZER, f"{given.stem}.{TOKENIZER}"}
    beside = path.parent == given.parent and (tokenizer or path.name.startswith(f"{given.name}."))
    return path.name not in _WRITTEN and (path == given or path in given.parents or beside)
