"""One checkpoint directory, read whole or not at all. Which directory that is, directory.py and read.py find out."""

import contextlib
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from smedjan_common.backend import Snapshot
from smedjan_common.checkpoint.manifest import MANIFEST, OPTIMIZER, TOKENIZER, WEIGHTS, CheckpointInfo, read_manifest
from smedjan_common.checkpoint.tensors import check_tensors, open_regular, read_tensors
from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.errors import CheckpointError


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


def step_name(step: int) -> str:
    """`step-00001000`: names sort as their steps do."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step in a directory's name; None when it is not of a step checkpoint."""
    match = re.fullmatch(r"step-(\d{8,18})", name, re.ASCII)
    return int(match[1]) if match else None


def load_info(path: Path) -> CheckpointInfo:
    """What checkpoint.json says, after checking that every file is there in its full size. Reads no tensor.

    Raises CheckpointError.
    """
    with faults(path):
        info = read_manifest(path)
        if step_of(path.name) not in {None, info.step}:
            raise CheckpointError(f"{path / MANIFEST} is of step {info.step}.", "That does not fit the name of the directory.")
        for name, record in info.files.items():
            with open_regular(path / name) as file:
                size = file.seek(0, 2)
            if size != record.bytes and name == TOKENIZER:  # the others are named with their tensor when they are read
                raise CheckpointError(f"{path / name} is damaged.", f"It has {size:,} bytes, checkpoint.json says {record.bytes:,}.")
            if size != record.bytes:
                check_tensors(path / name, record, info.tensors[name])
        return info


def load(path: Path, *, optimizer: bool = True, verify: bool = True) -> Checkpoint:
    """The checkpoint in this very directory; raises CheckpointError naming file and tensor."""
    info = load_info(path)
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
    info = load_info(path := Path(path))
    with faults(path):
        _read_tokenizer(info)
        for name, tensors in info.tensors.items():
            check_tensors(path / name, info.files[name], tensors)
    return info


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
