"""The teacher of a run: a checkpoint that stays as it is, which steps learn from besides the texts (training/distillation.py).

A run keeps the teacher that it began with: checkpoints say where it was and the hash of its weights, and a run that goes on reads it from
there, or from where --teacher-checkpoint says that it is now.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from smedjan_common.backend import OwnFormat
from smedjan_common.checkpoint import CheckpointInfo, check_readable, newest, read_weights, weights_hash
from smedjan_common.checkpoint.new_rows import with_new_rows
from smedjan_common.checkpoint.pulled import checkpoint_here
from smedjan_common.errors import CheckpointError, ConfigError
from smedjan_common.files.names import TOKENIZER
from smedjan_common.model.config import ModelConfig
from smedjan_common.model.params import head_name
from smedjan_common.run.asked import Asked
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.tokenizer.growing import extends
from smedjan_common.training.config import TrainConfig
from smedjan_common.training.mesh import MeshShape, check_mesh

TEACHER = "teacher"  # in a checkpoint's "extra": {"path", "weights": a hash}


class Teacher(NamedTuple):
    """info: its checkpoint. model: with the vocabulary of the run. seen: how many tokens its weights mean something for; known: how many
    of them, the first ones, the run has too."""

    info: CheckpointInfo
    model: ModelConfig
    seen: int
    known: int

    def record(self) -> dict[str, Any]:
        """What checkpoints of the run say of it."""
        return {"path": str(self.info.path.resolve()), "weights": weights_hash(self.info)}

    def weights(self, own: OwnFormat | None) -> dict[str, Any]:
        """Its parameters, with the rows of `model`: tokens of the run that it does not know are the mean of the others, as in a model that
        is given new tokens (checkpoint/new_rows.py). Raises CheckpointError."""
        params, rows = dict(read_weights(self.info, own, on_host=True)), self.model.padded_vocab_size
        for name in {"embed.weight", head_name(self.model)}:
            params[name] = np.asarray(params[name])[:rows]
        if self.seen < self.model.vocab_size or len(params["embed.weight"]) < rows:
            params = with_new_rows(params, self.model, min(self.seen, self.model.vocab_size), self.model.vocab_size)
        return params


def model_of(teacher: Teacher | None) -> ModelConfig | None:
    """Its model, where there is a teacher."""
    return teacher.model if teacher else None


def teacher_of(asked: Asked, begun: CheckpointInfo | None, model: ModelConfig, tokenizer: Tokenizer | None) -> Teacher | None:
    """The teacher of a run of `model`; None where it has none. begun: the step checkpoint that the run goes on from. tokenizer: of the run,
    None before it is read.

    Raises CheckpointError for one of other tokens, and for another one than the run has had, or none, where it was.
    """
    info = teacher_info(asked, begun)
    return _of(info, model, tokenizer) if info else None


def teacher_at(path: str | os.PathLike, model: ModelConfig, tokenizer: Tokenizer | None) -> Teacher:
    """The newest weights under `path` as the teacher of a model. Raises CheckpointError where there are none, or of other tokens."""
    return _of(newest(checkpoint_here(path)), model, tokenizer)


def check_teacher(teacher: Teacher, train: TrainConfig, backend: str, mesh: MeshShape | None = None) -> None:
    """Raises ConfigError, CheckpointError for a teacher from which nothing would be learned, or that cannot read what the run reads."""
    if train.distill_alpha == 0:
        raise ConfigError("--distill-alpha is 0.", "Nothing would be learned from the teacher.", "Take 0.5, or no --teacher-checkpoint.")
    check_readable(teacher.info, backend)
    if train.seq_len > (length := teacher.model.context_length):
        what = f"The teacher {teacher.info.path} has a context of {length} tokens, and sequences have {train.seq_len}."
        raise ConfigError(what, "What it says past its context is of no use.", f"Take --seq-len {length}, or another teacher.")
    try:
        train.check_model(teacher.model)
        if mesh:
            check_mesh(mesh, teacher.model, train.batch_size, train.grad_accum)
    except ConfigError as error:
        raise ConfigError(f"The teacher: {error.what}", error.why, error.fix) from None


def _of(info: CheckpointInfo, model: ModelConfig, tokenizer: Tokenizer | None) -> Teacher:
    own = own_tokenizer(info)
    if tokenizer:
        _check_tokenizer(info, own, tokenizer)
    seen = min(own.vocab_size if own else info.model.vocab_size, info.model.vocab_size)
    known = min(seen, model.vocab_size, tokenizer.vocab_size if tokenizer else seen)
    return Teacher(info, dataclasses.replace(info.model, vocab_size=model.vocab_size), seen, known)


def teacher_info(asked: Asked, begun: CheckpointInfo | None) -> CheckpointInfo | None:
    """Its checkpoint. Raises CheckpointError where it is not the one of the run that goes on, or gone."""
    given = asked.teacher
    if begun is None:
        return newest(checkpoint_here(given)) if given else None
    record = (begun.extra or {}).get(TEACHER)
    if record is None:
        if given and asked.is_given("teacher_checkpoint"):
            what, why = f"The run of {begun.path} has no teacher.", "A run goes on with what it began with."
            raise CheckpointError(what, why, f"Begin another with its weights: --pretrained {begun.path} --checkpoint-dir NEW.")
        return None
    path, weights = record["path"], record["weights"]
    fix = f"Bring it back, or say where it is now: --teacher-checkpoint PATH, of the same weights ({weights[:16]}…)."
    try:
        info = newest(checkpoint_here(given if given and asked.is_given("teacher_checkpoint") else path))
    except CheckpointError as error:
        raise CheckpointError(f"The teacher of this run cannot be read, {path}.", f"{error.what} {error.why}", fix) from error
    if weights_hash(info) != weights:
        what = f"{info.path} is not the teacher of this run: its weights are {weights_hash(info)[:16]}…"
        raise CheckpointError(what, f"The run began with {path}, and goes on with it.", fix)
    return info


def own_tokenizer(info: CheckpointInfo) -> Tokenizer | None:
    """That of a checkpoint, where it has one."""
    return Tokenizer.load(info.path) if (Path(info.path) / TOKENIZER).is_file() else None


def _check_tokenizer(info: CheckpointInfo, own: Tokenizer | None, tokenizer: Tokenizer) -> None:
    """Raises CheckpointError for a teacher to whom a token means something else than to the run."""
    if own:
        related = extends(own, tokenizer) or extends(tokenizer, own)
    else:
        related = info.tokenizer_hash == tokenizer.hash or (not info.tokenizer_hash and info.model.vocab_size >= tokenizer.vocab_size)
    if not related:
        raise CheckpointError(
            f"The teacher {info.path} has another tokenizer: {(info.tokenizer_hash or 'unknown')[:16]}… there, {tokenizer.hash[:16]}… now.",
            "What it says is said of tokens, and the same token would mean different text.",
            "Take a teacher of the same tokenizer, or train with its: --tokenizer TEACHER/tokenizer.json on texts, not token files.",
        )
