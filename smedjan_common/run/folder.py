"""A run as files: RunConfig says what to run, RunFolder writes the run folder.

CHECKPOINT_DIR/config.json   metrics.jsonl   step-00001000/ (or orbax-00001000/)   final/   loss.png   samples/   data/
"""

import contextlib
import dataclasses
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import smedjan_common
from smedjan_common.backend import Device, OwnFormat, Snapshot, State
from smedjan_common.checkpoint import (
    ADAPTER,
    AVERAGED,
    About,
    AdapterRecord,
    BaseWeights,
    CheckpointInfo,
    SavedTokenizer,
    find_base,
    prune_checkpoints,
    start_own,
    weights_hash,
    write_checkpoint,
    write_final,
)
from smedjan_common.checkpoint.load import step_name
from smedjan_common.checkpoint.mirror import Mirror
from smedjan_common.checkpoint.own import FORMATS
from smedjan_common.checkpoint.write import attend, weights_of
from smedjan_common.data.mixture import Mixture
from smedjan_common.data.token_file import TokenFile
from smedjan_common.files.atomic_file import write_atomically
from smedjan_common.files.names import CONFIG, FINAL, GIVEN, PLOT, SAMPLES
from smedjan_common.files.regular import read_regular
from smedjan_common.model.config import ModelConfig
from smedjan_common.model.flops import train_flops_per_token
from smedjan_common.reporting.console import say
from smedjan_common.reporting.curves import Curve
from smedjan_common.reporting.metrics import Row
from smedjan_common.reporting.plot import plot
from smedjan_common.run.config_file import to_toml
from smedjan_common.run.hosts import ALONE, Hosts
from smedjan_common.run.teacher import TEACHER, Teacher
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.training.config import TrainConfig
from smedjan_common.training.objectives import OBJECTIVES

COMMANDS = {name: row.command for name, row in OBJECTIVES.items()}  # what a run learns -> the command that begins one
ORIGIN = "pretrained"  # in a checkpoint's "extra": the weights that the run began with, and what those were made of
EXTENDS = "extends"  # in a checkpoint's "extra": the hash of the tokenizer that the run's own was made of
REFERENCE = "reference"  # in config.json and a checkpoint's "extra": what a run compares answers with


class ReferenceScores(NamedTuple):
    """Log-probabilities that a reference gives to the documents of train_data and val_data, float32; None where the objective has none.
    record: what is written of it (run/reference_scores.py)."""

    train: np.ndarray | None = None
    val: np.ndarray | None = None
    record: dict[str, Any] | None = None


NO_SCORES = ReferenceScores()


@dataclass(frozen=True)
class RunConfig:
    """Everything `loop.run` needs besides a backend.

    train_data, val_data: token files. start: a step checkpoint to go on from; its hashes are compared when it is read. pretrained: a
    checkpoint whose weights a new run starts from. history: rows of metrics.jsonl before `start` when it lies in another folder.
    flags: what config.json records. given: those that were given, for config.toml. objective: a key of COMMANDS. gained: how many tokens
    the tokenizer has more than that of `pretrained`; extends: the hash of that one. reference: of pairs of answers. teacher: a model that
    the run learns from. origin: the weights that it began with, and what those were made of. mirror: sends the run to the address that
    --checkpoint-dir is.
    """

    model: ModelConfig
    train: TrainConfig
    checkpoint_dir: Path
    train_data: TokenFile | Mixture
    val_data: TokenFile | None
    tokenizer: Tokenizer
    start: CheckpointInfo | None = None
    pretrained: CheckpointInfo | None = None
    history: list[Row] | None = None
    checkpoint_every: int = 500
    keep: int = 3
    keep_every: int = 0
    checkpoint_format: str = "neutral"
    log_every: int = 10
    eval_every: int = 250
    eval_batches: int = 20
    sample_every: int = 0
    sample_prompt: str = ""
    sample_tokens: int = 128
    tracker: tuple[str, ...] = ()
    flags: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    objective: str = "lm"
    gained: int = 0
    extends: str | None = None
    origin: dict[str, Any] | None = None
    mirror: Mirror | None = None
    reference: ReferenceScores = NO_SCORES
    teacher: Teacher | None = None


class RunFolder:
    """Writes everything in the run folder but metrics.jsonl. Of several hosts the first writes; the others take part where an array is
    on all of them."""

    def __init__(self, config: RunConfig, device: Device, hosts: Hosts = ALONE):
        self.config, self.path, self._hosts = config, config.checkpoint_dir, hosts
        self._about = About(
            model=config.model,
            train=config.train,
            tokenizer=SavedTokenizer.of(config.tokenizer),
            dataset=self._dataset(config.train_data),
            framework={"name": device.backend, "device": device.name, **device.versions},
            extra=self._more() or None,
        )

    def _more(self) -> dict[str, Any]:
        """What checkpoint.json says besides: which tokenizer the run's own was made of, what it is compared with, who teaches it, which
        weights it began with, and which its adapters belong to."""
        config = self.config
        known = {EXTENDS: config.extends, REFERENCE: config.reference.record, TEACHER: config.teacher and config.teacher.record()}
        known[ORIGIN] = config.origin
        more: dict[str, Any] = {name: value for name, value in known.items() if value}
        if config.train.adapters and (base := find_base(config.start) if config.start else config.pretrained):
            where = BaseWeights.at(base.path, self.path, weights_hash(base))
            more[ADAPTER] = AdapterRecord(config.train.adapters, where).to_json()
        return more

    def _dataset(self, data: TokenFile | Mixture) -> dict[str, Any]:
        """Path relative to the run folder when it lies inside, so that the folder can move; else absolute. A mixture lists its files."""
        if isinstance(data, Mixture):
            files = [self._dataset(file) | {"weight": weight} for file, weight in zip(data.files, data.weights, strict=True)]
            return {"hash": data.hash, "files": files, "tokens": data.num_tokens}
        folder, path = self.path.resolve(), Path(data.path).resolve()
        return {
            "hash": data.hash,
            "path": str(path.relative_to(folder) if path.is_relative_to(folder) else path),
            "tokens": data.num_tokens,
        }

    def write_config(self, initial: str | None = None) -> dict[str, Any]:
        """Write config.json and return it: model, training, flags, data, tokenizer, device, versions, and the digest of the initial values.

        initial: the digest, where this start drew them. A run that goes on keeps the one it began with; one from --pretrained has none.
        """
        if self.config.start:
            initial = (read_config(self.config.start.path.parent) or {}).get("initial_values")
        values = {
            "model": self.config.model.to_dict(),
            "objective": self.config.objective,
            "train": self.config.train.to_dict(),
            "flags": self.config.flags,
            "dataset": self._about.dataset,
            "val_dataset": self._dataset(self.config.val_data) if self.config.val_data else None,
            **({REFERENCE: self.config.reference.record} if self.config.reference.record else {}),
            "tokenizer_hash": self.config.tokenizer.hash,
            "initial_values": initial,
            "framework": self._about.framework,
            "versions": {"smedjan": smedjan_common.__version__, "python": platform.python_version(), "numpy": np.__version__},
        }
        if not self._hosts.first:
            return values
        write_atomically(self.path / CONFIG, (json.dumps(values, indent=1) + "\n").encode())
        self._write_given()
        return values

    def _write_given(self) -> None:
        """config.toml: the flags that were given, now and when the run began."""
        before = ""
        if self.config.start:
            with contextlib.suppress(OSError, UnicodeDecodeError):
                before = read_regular(self.config.start.path.parent / GIVEN).decode()
        write_atomically(self.path / GIVEN, to_toml(self.config.given, before, COMMANDS[self.config.objective]).encode("utf-8", "replace"))

    def save(self, snapshot: Snapshot, metrics: Row, extra: Row) -> Path:
        """Write a step checkpoint, then remove what --keep does not keep. extra: what the loop needs to go on, beside the state."""
        if not self._hosts.first:
            attend(snapshot)
            return self.path / step_name(snapshot.step)
        about = dataclasses.replace(self._about, extra=self._extra(extra))
        return self._pruned(write_checkpoint(self.path, snapshot, about, metrics=metrics))

    def start_own(self, own: OwnFormat, state: State, step: int, metrics: Row, extra: Row) -> Callable[[], Path]:
        """Take the state for a step checkpoint in the backend's own format; what is returned does what `save` does."""
        if not self._hosts.first:
            return self._attend_own(own, state, step)
        params, slots = own.tensors(state)
        finish = start_own(
            self.path,
            lambda folder: self._begin_own(own, state, folder),
            dataclasses.replace(self._about, extra=self._extra(extra)),
            kind=own.name,
            step=step,
            params=params,
            optimizer_arrays=slots,
            metrics=metrics,
        )
        return lambda: self._pruned(finish())

    def _begin_own(self, own: OwnFormat, state: State, folder: Path) -> Callable[[], None]:
        """All hosts write their parts into `folder`, whose name host 0 has made; it is complete when all are done."""
        self._hosts.tell("folder", str(folder.relative_to(self.path)))
        wait = own.begin(state, folder)

        def all_of_them() -> None:
            wait()
            self._hosts.gather("written")

        return all_of_them

    def _attend_own(self, own: OwnFormat, state: State, step: int) -> Callable[[], Path]:
        folder = self.path / self._hosts.tell("folder")
        wait = own.begin(state, folder)

        def finish() -> Path:
            wait()
            self._hosts.gather("written")
            return self.path / step_name(step, FORMATS[own.name])

        return finish

    def _extra(self, extra: Row) -> Row:
        return {**(self._about.extra or {}), **extra}

    def _pruned(self, path: Path) -> Path:
        mirror = self.config.mirror
        prune_checkpoints(self.path, self.config.keep, keep_every=self.config.keep_every, spare=mirror.spared if mirror else ())
        if mirror:
            mirror.put()
        return path

    def save_final(self, snapshot: Snapshot, metrics: Row) -> Path:
        """Write final/: weights (averages, with --ema), configuration and tokenizer."""
        snapshot = weights_of(dataclasses.replace(snapshot, params=snapshot.weights))
        if not self._hosts.first:
            attend(snapshot)
            return self.path / FINAL
        averaged = {AVERAGED: self.config.train.ema} if self.config.train.ema else {}
        about = dataclasses.replace(self._about, extra=self._extra(averaged) or None)
        return write_final(self.path, snapshot, about, metrics=metrics)

    def save_sample(self, step: int, text: str) -> None:
        """Write a sample's text. It is not worth a run: what goes wrong is told, not raised. What is no character (a prompt from a command
        line may hold it) is replaced."""
        if not self._hosts.first:
            return
        folder = self.path / SAMPLES
        try:
            folder.mkdir(exist_ok=True)
            (folder / f"step-{step:08d}.txt").write_text(text + "\n", encoding="utf-8", errors="replace")
        except OSError as error:
            say(f"note: the sample was not written: {error.strerror or error}")

    def draw(self, rows: list[Row]) -> None:
        """Draw loss.png. A picture is not worth a run: what goes wrong is told, not raised."""
        if not self._hosts.first:
            return
        try:
            curve = Curve(rows, train_flops_per_token(self.config.model, self.config.train.seq_len, adapters=self.config.train.adapters))
            plot({"training": curve}, self.path / PLOT, self.path.resolve().name)
        except Exception as error:
            say(f"note: {PLOT} was not drawn: {(error.strerror if isinstance(error, OSError) else '') or error}")


def read_config(folder: Path) -> dict[str, Any] | None:
    """config.json of a run folder; None when there is none or it is incomplete."""
    try:
        values = json.loads(read_regular(folder / CONFIG).decode("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None
