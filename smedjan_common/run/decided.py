"""What a run will be, decided from its flags, its beginning and its data before a framework is imported.

It is decided twice by the same function: before texts are tokenised, which may take hours, so that what no text can mend is refused
(run.checks), and with the data, which gives the size of the vocabulary and the steps of one pass.
"""

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smedjan_common.backend import Device
from smedjan_common.checkpoint import CheckpointInfo, read_info, weights_hash
from smedjan_common.data.batches import batches
from smedjan_common.errors import CheckpointError
from smedjan_common.files.names import FINAL, WEIGHTS
from smedjan_common.model.config import ModelConfig
from smedjan_common.model.flops import forward_flops_per_token, train_flops_per_token
from smedjan_common.model.presets import VOCAB_MULTIPLE
from smedjan_common.reporting.console import count
from smedjan_common.reporting.metrics import read_rows
from smedjan_common.reporting.table import Line
from smedjan_common.run.asked import Asked
from smedjan_common.run.cadence import CADENCES, interval
from smedjan_common.run.data import RunData, trains_tokenizer
from smedjan_common.run.folder import EXTENDS, NO_SCORES, ORIGIN, ReferenceScores, RunConfig
from smedjan_common.run.recorded import to_record
from smedjan_common.run.settings import new_model, pretrained_model, same_model, takes_auto, train_config
from smedjan_common.run.start import Begin, GoOn, New, Pretrained, Say
from smedjan_common.run.teacher import Teacher, teacher_info, teacher_of
from smedjan_common.training.config import CHECKPOINT_FORMATS, TrainConfig
from smedjan_common.training.mesh import MeshShape, parse_mesh
from smedjan_common.training.preferences import LOSSES


@dataclass(frozen=True)
class Decided:
    """data: None before the texts are tokenised. mesh: None where the backend chooses it. teacher: None where there is none."""

    backend: str
    asked: Asked
    begin: Begin
    folder: Path
    mesh: MeshShape | None
    model: ModelConfig
    train: TrainConfig
    data: RunData | None
    teacher: Teacher | None = None

    @property
    def flops_per_token(self) -> int:
        """FLOPs of a step per token, those of the forward pass of a teacher too."""
        length = self.train.seq_len
        own = train_flops_per_token(self.model, length, adapters=self.train.adapters)
        return own + (forward_flops_per_token(self.teacher.model, length) if self.teacher else 0)

    @property
    def start(self) -> CheckpointInfo | None:
        """The step checkpoint that the run goes on from."""
        return _begun(self.begin)

    @property
    def pretrained(self) -> CheckpointInfo | None:
        """The weights that a new run begins with."""
        return self.begin.info if isinstance(self.begin, Pretrained) else None

    @property
    def known_steps(self) -> bool:
        """Whether the number of steps is final: not where it is one pass over texts that are not tokenised yet."""
        if self.data and self.data.train:
            return True
        return self.asked.is_given("steps") or (base_of(self.begin) is not None and not self.asked.is_given("epochs"))

    @property
    def done(self) -> bool:
        """Whether the run that goes on has all its steps, and final/ is of the last."""
        if not (info := self.start) or not self.known_steps or info.step < self.train.steps:
            return False
        try:
            return read_info(self.folder / FINAL).step == info.step
        except CheckpointError:
            return False

    def every(self, name: str) -> int:
        """Steps between two evaluations, samples or checkpoints; 0: none on the way."""
        return interval(name, self.asked.value(name), self.train.steps)

    def computing_in(self, auto: str) -> "Decided":
        """The same with what --dtype auto means to the framework."""
        if not takes_auto(self.asked, base_of(self.begin)):
            return self
        train = dataclasses.replace(self.train, dtype=auto)
        return dataclasses.replace(self, train=train)


def decide(backend: str, asked: Asked, begin: Begin, folder: Path, data: RunData | None = None) -> Decided:
    """Raises ConfigError for flags that make no model or no training, CheckpointError for a teacher that cannot teach it."""
    mesh = parse_mesh(asked.value("mesh"))
    model = _model(_grown(begin, data), asked, _vocab_size(asked, begin, mesh, data))
    train = train_config(asked, base_of(begin), objective_of(asked, begin), model.dim, _epoch(asked, begin, data))
    if train.lora_rank and isinstance(begin, Pretrained) and data and data.tokenizer:
        train = dataclasses.replace(train, lora_rows_from=data.tokenizer.vocab_size - data.gained, lora_rows=data.gained)
    decided = Decided(backend, asked, begin, folder, mesh, model, train, data)
    if decided.done and not asked.is_given("teacher_checkpoint"):
        return decided  # who has taught it may be gone
    return dataclasses.replace(decided, teacher=teacher_of(asked, _begun(begin), model, data.tokenizer if data else None))


def base_of(begin: Begin) -> TrainConfig | None:
    """How the run was trained up to here, where one goes on."""
    return begin.info.train if isinstance(begin, GoOn) else None


def _begun(begin: Begin) -> CheckpointInfo | None:
    return begin.info if isinstance(begin, GoOn) else None


def _grown(begin: Begin, data: RunData | None) -> Begin:
    """The beginning, its weights with rows for the tokens that the tokenizer has gained."""
    if not isinstance(begin, Pretrained) or not data or not data.gained or not data.tokenizer:
        return begin
    size = max(begin.info.model.vocab_size, data.tokenizer.vocab_size)
    return Pretrained(dataclasses.replace(begin.info, model=dataclasses.replace(begin.info.model, vocab_size=size)))


def _model(begin: Begin, asked: Asked, vocab_size: int) -> ModelConfig:
    match begin:
        case New():
            return new_model(asked.flags, vocab_size)
        case GoOn(info):
            return same_model(info.model, asked)
        case Pretrained(info):
            return pretrained_model(info.model, info.path, asked)


def _vocab_size(asked: Asked, begin: Begin, mesh: MeshShape | None, data: RunData | None) -> int:
    """That of the tokenizer; before it is read that of the teacher, or of the one to be trained, else one that no mesh refuses."""
    if data and data.tokenizer:
        return data.tokenizer.vocab_size
    if isinstance(begin, New) and (info := teacher_info(asked, None)):
        return info.model.vocab_size
    return asked.value("vocab_size") if trains_tokenizer(asked.flags.data) or not mesh else VOCAB_MULTIPLE * mesh.tensor


def _epoch(asked: Asked, begin: Begin, data: RunData | None) -> int:
    if data is None or data.train is None:
        return asked.value("warmup") or 1
    known = base_of(begin) or asked.flags.training
    found = batches(data.train, known.seq_len, known.batch_size, 0, known.packing)
    return math.ceil((asked.chats.epochs if asked.chats else 1) * found.num_windows / found.batch_size)


def teacher_line(decided: Decided) -> list[Line]:
    """What a plan says of the teacher; nothing where there is none."""
    if not (teacher := decided.teacher):
        return []
    shared = "" if teacher.known == decided.model.vocab_size else f", which knows {teacher.known} of the tokens"
    said = f"alpha {decided.train.distill_alpha:g}, temperature {decided.train.distill_temperature:g}"
    return [("teacher", f"{teacher.info.path}, {count(teacher.model.num_params())} parameters{shared}: {said}")]


def run_config(decided: Decided, say: Say, reference: ReferenceScores = NO_SCORES) -> RunConfig:
    """What the loop needs of it. reference: what pairs of answers are compared with."""
    data, value = decided.data, decided.asked.value
    report: dict[str, Any] = dataclasses.asdict(decided.asked.flags.report)
    report |= {name: decided.every(name) for name in CADENCES}
    assert data
    assert data.train
    assert data.tokenizer
    return RunConfig(
        decided.model,
        decided.train,
        decided.folder,
        data.train,
        data.val,
        data.tokenizer,
        start=decided.start,
        pretrained=decided.pretrained,
        history=read_rows(decided.start.path.parent) if decided.start else None,
        keep=value("keep"),
        keep_every=value("keep_every"),
        checkpoint_format=_format_here(value("checkpoint_format"), decided.backend, say),
        flags=to_record(decided.asked.flags) | _weights_in_place(decided),
        given=decided.asked.given_values(),
        objective=objective_of(decided.asked, decided.begin),
        gained=data.gained,
        extends=_extends(decided, data),
        reference=reference,
        teacher=decided.teacher,
        origin=_origin(decided),
        **report,
    )


def settled(decided: Decided, device: Device) -> dict[str, Any]:
    """What all hosts of a run must know alike before its first step."""
    data, start = decided.data, decided.start or decided.pretrained
    assert data
    return {
        "the versions": device.versions,
        "the model": decided.model.to_dict(),
        "the training": decided.train.to_dict(),
        "the dataset's hash": data.train.hash if data.train else None,
        "the hash of what it validates on": data.val.hash if data.val else None,
        "the tokenizer's hash": data.tokenizer.hash if data.tokenizer else None,
        "the checkpoint that it starts from": [start.path.name, start.step, weights_hash(start)] if start else None,
        "the weights of the teacher": weights_hash(decided.teacher.info) if decided.teacher else None,
        "the report": dataclasses.asdict(decided.asked.flags.report) | {name: decided.every(name) for name in CADENCES},
        "the mesh": device.mesh,
    }


def objective_of(asked: Asked, begin: Begin) -> str:
    """What the run learns, a key of OBJECTIVES: "sft" answers, "lm" texts. A run that goes on learns what it did."""
    if isinstance(begin, GoOn):
        return begin.recorded.get("objective") or (begin.info.train.objective if begin.info.train else "lm")
    return LOSSES[asked.pairs.loss].name if asked.pairs else "sft" if asked.chats else "lm"


def _extends(decided: Decided, data: RunData) -> str | None:
    """The hash of the tokenizer that the run's own was made of, now or before."""
    if data.gained and decided.pretrained:
        return decided.pretrained.tokenizer_hash
    info = decided.start or decided.pretrained
    return (info.extra or {}).get(EXTENDS) if info else None


def _weights_in_place(decided: Decided) -> dict[str, Any]:
    """What --pretrained would say of a run that begins with the weights in its own folder."""
    info = decided.pretrained
    return {"pretrained": os.path.abspath(info.path)} if info and not decided.asked.value("pretrained") else {}


def _origin(decided: Decided) -> dict[str, Any] | None:
    """What the run began with, for its checkpoints: path, step and hash of the weights, and how those were made of others."""
    if not (info := decided.pretrained):
        return ((decided.start and decided.start.extra) or {}).get(ORIGIN)
    made = {name: value for name, value in (info.extra or {}).items() if name in ("grow", "merge", ORIGIN)}
    known = {"sha256": info.files[WEIGHTS].sha256} if WEIGHTS in info.files else {}
    return {"path": str(info.path), "step": info.step, **known, **made}


def _format_here(kind: str, backend: str, say: Say) -> str:
    """The format that this backend writes in a run whose format is `kind`; config.json keeps that one for when the run goes back."""
    if CHECKPOINT_FORMATS[kind] in {None, backend}:
        return kind
    say(f"note: checkpoints are neutral from here on: {kind}, which the run asks for, is of the backend {CHECKPOINT_FORMATS[kind]}.")
    return "neutral"
