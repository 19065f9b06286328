"""One checkpoint directory, read whole or not at all. Which directory that is, directory.py and read.py find out."""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from smedjan_common.backend import Snapshot
from smedjan_common.checkpoint.manifest import ARRAYS, FORMAT, MANIFEST, OPTIMIZER, ORBAX, TOKENIZER, WEIGHTS, CheckpointInfo, read_manifest
from smedjan_common.checkpoint.tensors import check_tensors, open_regular, read_tensors
from smedjan_common.errors import CheckpointError
from smedjan_common.files.hashing import rest_hash
from smedjan_common.model.config import ModelConfig
from smedjan_common.training.config import CHECKPOINT_FORMATS, TrainConfig


class Kind(NamedTuple):
    """A kind of step checkpoint: its name on the command line, how its directories' names begin."""

    name: str
    prefix: str

    @property
    def backend(self) -> str | None:
        """The backend that alone reads it; None: every one does."""
        return CHECKPOINT_FORMATS[self.name]


KINDS = {FORMAT: Kind("neutral", "step"), ORBAX: Kind("orbax", "orbax")}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: arrays, tokenizer, and what checkpoint.json says."""

    snapshot: Snapshot
    tokenizer_json: str | None
    info: CheckpointInfo

    @property
    def path(self) -> Path:
        """Its directory."""
        return self.info.path

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.info.step

    @property
    def model(self) -> ModelConfig:
        """The model it is of."""
        return self.info.model

    @property
    def train(self) -> TrainConfig | None:
        """How it was trained; None when that is not known (an imported model)."""
        return self.info.train

    @property
    def tokenizer_hash(self) -> str | None:
        """Hash of the tokenizer, as the run that wrote it gave it."""
        return self.info.tokenizer_hash

    @property
    def dataset(self) -> dict | None:
        """The dataset, as the run that wrote it described it."""
        return self.info.dataset


def step_name(step: int, format: str = FORMAT) -> str:
    """`step-00001000`, `orbax-00001000`: names sort as their steps do."""
    return f"{KINDS[format].prefix}-{step:08d}"


def step_of(name: str) -> int | None:
    """The step in a directory's name; None when it is not of a step checkpoint."""
    match = _NAME.fullmatch(name)
    return int(match[2]) if match else None


def check_name(name: str, step: int, format: str) -> bool:
    """Whether a directory of this name may hold this step in this format: a step checkpoint's must, any other says nothing."""
    match = _NAME.fullmatch(name)
    return not match or (int(match[2]), match[1]) == (step, KINDS[format].prefix)


_NAME = re.compile(rf"({'|'.join(kind.prefix for kind in KINDS.values())})-(\d{{8,18}})", re.ASCII)


def load_info(path: Path) -> CheckpointInfo:
    """What checkpoint.json says, after checking that every file is there in its full size. Reads no tensor.

    Raises CheckpointError.
    """
    with faults(path):
        info = read_manifest(path)
        if not check_name(path.name, info.step, info.format):
            raise CheckpointError(f"{path / MANIFEST} is of step {info.step}.", "That does not fit the name of the directory.")
        if info.format != FORMAT:
            _check_listing(info)
        for name, record in info.files.items():
            with open_regular(path / name) as file:
                size = file.seek(0, 2)
            if size != record.bytes and name in (WEIGHTS, OPTIMIZER):  # these are named with their tensor when they are read
                check_tensors(path / name, record, info.tensors[name])
            elif size != record.bytes:
                raise CheckpointError(f"{path / name} is damaged.", f"It has {size:,} bytes, checkpoint.json says {record.bytes:,}.")
        return info


def foreign(info: CheckpointInfo) -> CheckpointError:
    """The refusal of a checkpoint that is another backend's own, with the command that makes a neutral one of it."""
    kind, target = KINDS[info.format], info.path.with_name(step_name(info.step))
    return CheckpointError(
        f"{info.path} is in the format {kind.name}, not neutral.",
        f"Only the backend {kind.backend} reads it.",
        f"Convert it to a neutral one, which every backend reads: convert {info.path} {target} --to neutral",
    )


def _check_listing(info: CheckpointInfo) -> None:
    """Raises CheckpointError for a link among the arrays, or a file that checkpoint.json does not list: the backend would read it."""
    for path in (info.path / ARRAYS, *(Path(folder, name) for folder, *both in os.walk(info.path / ARRAYS) for name in chain(*both))):
        if path.is_symlink():
            raise CheckpointError(f"{path} is a symbolic link.", "Links are not followed.")
        if not path.is_dir() and path.relative_to(info.path).as_posix() not in info.files:
            raise CheckpointError(f"{path} is an extra file.", "checkpoint.json does not list it.")


def load(path: Path, *, optimizer: bool = True, verify: bool = True) -> Checkpoint:
    """The checkpoint in this very directory; raises CheckpointError naming file and tensor, and for one that is a backend's own."""
    return load_arrays(load_info(path), optimizer=optimizer, verify=verify)


def load_arrays(info: CheckpointInfo, *, optimizer: bool = True, verify: bool = True) -> Checkpoint:
    """As load, where checkpoint.json is read already. Hashes are taken while the arrays are read, each file once."""
    path = info.path
    if info.format != FORMAT:
        raise foreign(info)
    with faults(path):
        tokenizer = _read_tokenizer(info)
        weights = read_tensors(path / WEIGHTS, info.files[WEIGHTS], info.tensors[WEIGHTS], verify=verify)
        slots = {}
        if optimizer and info.optimizer:
            slots = read_tensors(path / OPTIMIZER, info.files[OPTIMIZER], info.tensors[OPTIMIZER], verify=verify)
    return Checkpoint(Snapshot(info.step, weights, slots), tokenizer, info)


def verify_checkpoint(path: str | Path) -> CheckpointInfo:
    """Read every byte of one checkpoint directory and compare the hashes, in a few MB of memory.

    Raises CheckpointError naming file and tensor.
    """
    verify_info(info := load_info(Path(path)))
    return info


def verify_info(info: CheckpointInfo) -> None:
    """As verify_checkpoint, where checkpoint.json is read already."""
    path = info.path
    with faults(path):
        _read_tokenizer(info)
        for name, record in info.files.items():
            if name in info.tensors:
                check_tensors(path / name, record, info.tensors[name])
            elif name != TOKENIZER and regular_hash(path / name) != record.sha256:
                raise CheckpointError(f"{path / name} is damaged.", "Its SHA-256 is not the one in checkpoint.json.")


def regular_hash(path: Path) -> str:
    """SHA-256 of a file of a checkpoint, which is no link."""
    with open_regular(path) as file:
        return rest_hash(file)


def _read_tokenizer(info: CheckpointInfo) -> str | None:
    if TOKENIZER not in info.files:
        return None
    path, record = info.path / TOKENIZER, info.files[TOKENIZER]
    with open_regular(path) as file:
        raw = file.read(record.bytes + 1)
    if len(raw) != record.bytes or hashlib.sha256(raw).hexdigest() != record.sha256:
        raise CheckpointError(f"{path} is damaged.", "Its SHA-256 is not the one in checkpoint.json.")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is damaged.", f"It is not UTF-8: {error.reason} at byte {error.start}.") from None


@contextlib.contextmanager
def faults(path: Path) -> Iterator[None]:
    """Errors of the system while a checkpoint is read: of the checkpoint, not of the program."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        raise CheckpointError(f"{where} cannot be read.", f"{error.strerror or error}.", "Check the disk and the permissions.") from None
