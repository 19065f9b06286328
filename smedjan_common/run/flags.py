"""The flags of training, one frozen dataclass for both backends. Docstrings under the fields are the help.

On a resumed run those that are not given come from the run itself (recorded.py).
tests/fixtures/train_flags.txt lists the flags, so that drift is noticed.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro
from tyro.conf import OmitArgPrefixes, arg

from smedjan_common.command_line import NAMELESS
from smedjan_common.errors import flag
from smedjan_common.model.ffns import FFNS
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.presets import DEFAULT_FFN_MULT, DEFAULT_VOCAB_SIZE, PRESETS
from smedjan_common.optional import MaybeFloat, MaybeInt, MaybeStr
from smedjan_common.reporting.trackers import NONE, TRACKERS
from smedjan_common.run.option_flags import (
    chat_training_options,
    objective_options,
    option_flags,
    pair_training_options,
    row_options,
    shape_options,
    training_options,
)
from smedjan_common.training.cluster import HARDWARE
from smedjan_common.training.config import CHECKPOINT_FORMATS
from smedjan_common.training.preferences import LOSSES


def _filled(default: str, metavar: str) -> Any:
    """A flag whose default is worked out from the others; the help says how."""
    return arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


def _one_of(*names: str) -> Any:
    """A flag that takes one name of a table; the configuration refuses others and lists near ones."""
    return arg(metavar="|".join(names))


THIS_START = {"this_start": True}  # of a flag that counts for one start of a run: config.json does not record it


@dataclass(frozen=True)
class DataFlags:
    """What to train on."""

    dataset: Annotated[
        tuple[str, ...],
        arg(
            metavar="FILE ...",
            help="A token file (.bin, from `smedjan prepare`), several mixed by weight (a.bin:0.7 b.bin:0.3), or text and JSONL files:"
            " those are tokenised once, into CHECKPOINT_DIR/data. `smedjan train my.txt` is the same.",
            help_behavior_hint="(required for a new run)",
        ),
        NAMELESS,
    ] = ()
    val_dataset: Annotated[tuple[str, ...], _filled("a part of --dataset when that is text", "FILE ...")] = ()
    """What to validate on: a token file or texts, never trained on."""
    val_fraction: float = 0.02
    """The part of the texts of --dataset that is held out for validation when --val-dataset is not given."""
    tokenizer: Annotated[MaybeStr, _filled("the token file's own, or a new one for texts", "FILE")] = None
    """A tokenizer.json."""
    vocab_size: int = DEFAULT_VOCAB_SIZE
    """Vocabulary of the tokenizer that is trained when --dataset is text and --tokenizer is not given."""


@dataclass(frozen=True)
class RunFlags:
    """Where the run lives and how it starts."""

    checkpoint_dir: Annotated[MaybeStr, _filled("runs/DATASET-SIZE, or -sft, -dpo", "DIR")] = field(default=None, metadata=THIS_START)
    """The run folder: config.json, metrics.jsonl, step-*/, final/, loss.png."""
    checkpoint_every: Annotated[MaybeInt, _filled("a tenth of the steps, 1000 at most", "INT")] = None
    """Save a checkpoint every this many steps; always at the end and when stopped. 0: only then."""
    checkpoint_format: Annotated[str, _one_of(*CHECKPOINT_FORMATS)] = "neutral"
    """neutral: every backend can continue from it. orbax: JAX's own, written shard by shard; `convert` turns it into a neutral one."""
    keep: int = 3
    """Keep this many newest checkpoints. 0: all."""
    keep_every: int = 0
    """Besides those of --keep, keep every checkpoint whose step is a multiple of this, forever. 0: none."""
    resume: Annotated[
        str,
        arg(
            metavar="auto|never|PATH",
            help="auto: go on from the newest complete checkpoint of the run folder, or start. never: refuse a folder that has a run."
            " PATH: go on from this checkpoint. Flags that are not given come from the run that is resumed.",
        ),
    ] = field(default="auto", metadata=THIS_START)
    pretrained: Annotated[MaybeStr, arg(metavar="PATH", help_behavior_hint="")] = None
    """Start a new run from the weights and the tokenizer of this checkpoint (new optimizer, step 0)."""
    backend: Annotated[str, _one_of("auto", "jax", "mlx")] = field(default="auto", metadata=THIS_START)
    """The framework. auto: MLX on Apple Silicon, else JAX."""
    mesh: Annotated[
        str,
        arg(
            metavar="AXIS=N,...",
            help="How the run is spread over devices (JAX): data=2 splits the batch, fsdp=2 the train state too, tensor=2 heads,"
            " feed-forward and vocabulary; data=2,fsdp=4 takes eight devices. It changes no result, and a resumed run may use another one.",
            help_behavior_hint="(default: auto, the batch over all GPUs)",
        ),
    ] = field(default="auto", metadata=THIS_START)
    coordinator: Annotated[MaybeStr, _filled("of SLURM, Open MPI, Kubernetes or mlx.launch, else one process", "HOST:PORT")] = field(
        default=None, metadata=THIS_START
    )
    """Of a run of several processes: where host 0 is, and a free port there. The same on every host."""
    num_hosts: Annotated[MaybeInt, _filled("as --coordinator", "INT")] = field(default=None, metadata=THIS_START)
    """Processes of the run, one for each machine or for each GPU. 1: alone, whatever the environment says."""
    host_id: Annotated[MaybeInt, _filled("as --coordinator", "INT")] = field(default=None, metadata=THIS_START)
    """Which of them this one is, from 0."""
    force: Annotated[bool, tyro.conf.FlagCreatePairsOff] = field(default=False, metadata=THIS_START)
    """Go on where the memory or the disk is too small by estimate."""
    config: Annotated[MaybeStr, arg(metavar="FILE", help_behavior_hint="")] = field(default=None, metadata=THIS_START)
    """Flags from a TOML file, flat or in tables by these groups, or from the config.json of a run; those of the command line win."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = field(default=False, metadata=THIS_START)
    """Say what would be done, write nothing."""
    devices: Annotated[MaybeInt, _filled("those of this machine", "INT")] = field(default=None, metadata=THIS_START)
    """With --dry-run: plan for this many GPUs of --device, none of which need be here: memory, traffic, speed and time, and the mesh."""
    device: Annotated[str, _one_of(*HARDWARE)] = field(default="h100", metadata=THIS_START)
    """The GPU of --devices."""
    devices_per_host: int = field(default=8, metadata=THIS_START)
    """GPUs of one host, for --devices."""
    network_gbits: float = field(default=400.0, metadata=THIS_START)
    """Gigabits per second of each GPU to other hosts, for --devices."""


@dataclass(frozen=True)
class TaughtRunFlags(RunFlags):
    """Where the run lives and how it starts."""

    teacher_checkpoint: Annotated[MaybeStr, arg(metavar="PATH", help_behavior_hint="")] = None
    """Learn from this model too: of every token not only which one comes, but what the teacher makes of all of them."""


@dataclass(frozen=True)
class SizeFlag:
    """A named size."""

    size: Annotated[str, _one_of(*PRESETS, "custom")] = "tiny"
    """A preset (see `smedjan sizes`); the flags below replace single values of it, and custom needs the first three."""


@dataclass(frozen=True)
class LayerFlags:
    """Its layers."""

    dim: Annotated[MaybeInt, _filled("the size's", "INT")] = None
    """Width of the residual stream."""
    layers: Annotated[MaybeInt, _filled("the size's", "INT")] = None
    """Number of blocks."""
    heads: Annotated[MaybeInt, _filled("the size's", "INT")] = None
    """Number of query heads."""
    kv_heads: Annotated[MaybeInt, _filled("--heads", "INT")] = None
    """Number of key/value heads; fewer than --heads is grouped-query attention."""
    ffn_mult: Annotated[MaybeFloat, _filled(str(DEFAULT_FFN_MULT), "FLOAT")] = None
    """Feed-forward width over --dim, rounded up to a multiple of 256."""
    mixer: Annotated[str, arg(metavar="NAME,...", help=f"Sequence mixers, a pattern over the depth, of: {', '.join(MIXERS)}.")] = (
        "attention"
    )
    ffn: Annotated[
        MaybeStr,
        arg(
            metavar="NAME,...",
            help=f"Feed-forwards, a pattern over the depth, of: {', '.join(FFNS)}.",
            help_behavior_hint="(default: swiglu; experts when --experts is given)",
        ),
    ] = None


@dataclass(frozen=True)
class ModelFlags(option_flags("ShapeFlags", shape_options()), LayerFlags, SizeFlag):  # the fields of the last class come first
    """The model."""


@dataclass(frozen=True)
class MixerFlags(option_flags("MixerFlags", row_options())):
    """Options of individual mixers and of the experts; each applies only where its mixer is in --mixer."""


@dataclass(frozen=True)
class TrainingFlags(option_flags("TrainingFlags", [*training_options(), *objective_options("train")])):
    """How it is trained; one step sees --batch-size sequences of --seq-len tokens."""


@dataclass(frozen=True)
class ReportFlags:
    """What the run reports."""

    log_every: int = 10
    """A line of metrics every this many steps; the first and the last step always."""
    eval_every: Annotated[MaybeInt, _filled("a tenth of the steps", "INT")] = None
    """Validation loss every this many steps and at the end. 0: never."""
    eval_batches: int = 20
    """Batches of one validation, always the same ones."""
    sample_every: Annotated[MaybeInt, _filled("a fifth of the steps", "INT")] = None
    """Write a sample every this many steps and at the end, into the console and CHECKPOINT_DIR/samples. 0: never."""
    sample_prompt: str = ""
    """The text that samples continue."""
    sample_tokens: int = 128
    """Length of a sample."""
    tracker: Annotated[
        tuple[str, ...],
        arg(
            metavar=f"{'|'.join((*TRACKERS, NONE))} ...",
            help="Programs of others that get the figures and samples too, each from a thread of its own, offline unless its own settings"
            " say otherwise. What they write is in CHECKPOINT_DIR/trackers.",
            help_behavior_hint="(default: none)",
        ),
    ] = ()


@dataclass(frozen=True)
class TrainFlags:
    """Train a language model from raw text. Give the same command again to continue a run that was stopped."""

    data: OmitArgPrefixes[DataFlags] = field(default_factory=DataFlags)
    run: OmitArgPrefixes[TaughtRunFlags] = field(default_factory=TaughtRunFlags)
    model: OmitArgPrefixes[ModelFlags] = field(default_factory=ModelFlags)
    mixers: OmitArgPrefixes[MixerFlags] = field(default_factory=MixerFlags)
    training: OmitArgPrefixes[TrainingFlags] = field(default_factory=TrainingFlags)
    report: OmitArgPrefixes[ReportFlags] = field(default_factory=ReportFlags)


@dataclass(frozen=True)
class ChatDataFlags(DataFlags):
    """What to learn from."""

    dataset: Annotated[
        tuple[str, ...],
        arg(
            metavar="FILE ...",
            help="Conversations as JSON lines, JSON or Parquet: messages, ShareGPT, Alpaca, prompt and completion (docs/fine-tuning.md)."
            " They are tokenised once, into CHECKPOINT_DIR/data. `smedjan sft my.jsonl` is the same.",
            help_behavior_hint="(required for a new run)",
        ),
        NAMELESS,
    ] = ()
    val_dataset: Annotated[tuple[str, ...], _filled("a part of --dataset", "FILE ...")] = ()
    """Conversations to validate on, never trained on."""
    val_fraction: float = 0.02
    """The part of the rows of --dataset that is held out for validation, by a hash of each, when --val-dataset is not given."""
    tokenizer: Annotated[MaybeStr, _filled("that of --pretrained", "FILE")] = None
    """A tokenizer.json: that of the weights, with special tokens added if need be."""
    vocab_size: int = DEFAULT_VOCAB_SIZE
    """That of the tokenizer of the weights; another one is refused."""


@dataclass(frozen=True)
class ChatFlags:
    """How conversations are learned."""

    epochs: float = 2.0
    """How often the conversations are gone through when --steps is not given."""
    train_on: Annotated[str, _one_of("replies", "all")] = "replies"
    """What of a conversation is trained. replies: what the assistant says, and the token that ends it; all: everything."""
    too_long: Annotated[str, _one_of("drop", "truncate")] = "drop"
    """What is done with a conversation of more tokens than --seq-len: leave it out, or cut off its end."""
    max_dropped: float = 0.05
    """Refuse files of which more than this part of the rows teaches nothing and would be dropped."""
    template: Annotated[str, arg(metavar="auto|chatml|FILE")] = "auto"
    """How turns are written. auto: the model's own way, else chatml, whose two tokens are added to the tokenizer; or a file of Jinja."""


@dataclass(frozen=True)
class ChatTrainingFlags(option_flags("ChatTrainingFlags", [*chat_training_options(), *objective_options("sft")])):
    """How it is trained; one step sees --batch-size sequences of --seq-len tokens."""


@dataclass(frozen=True)
class SftFlags(TrainFlags):
    """Teach a trained model to answer, by conversations. Give the same command again to continue a run that was stopped."""

    data: OmitArgPrefixes[ChatDataFlags] = field(default_factory=ChatDataFlags)
    training: OmitArgPrefixes[ChatTrainingFlags] = field(default_factory=ChatTrainingFlags)
    chats: OmitArgPrefixes[ChatFlags] = field(default_factory=ChatFlags)


@dataclass(frozen=True)
class PairDataFlags(ChatDataFlags):
    """What to learn from."""

    dataset: Annotated[
        tuple[str, ...],
        arg(
            metavar="FILE ...",
            help="Pairs of answers as JSON lines, JSON or Parquet: prompt, chosen and rejected, and the other kinds of docs/fine-tuning.md."
            " They are tokenised once, into CHECKPOINT_DIR/data. `smedjan dpo my.jsonl` is the same.",
            help_behavior_hint="(required for a new run)",
        ),
        NAMELESS,
    ] = ()
    val_dataset: Annotated[tuple[str, ...], _filled("a part of --dataset", "FILE ...")] = ()
    """Pairs to validate on, never trained on."""
    val_fraction: float = 0.02
    """The part of the questions of --dataset that is held out for validation, by a hash of each, when --val-dataset is not given."""


@dataclass(frozen=True)
class PairFlags:
    """How preferences are learned."""

    loss: Annotated[str, _one_of(*LOSSES)] = "sigmoid"
    """What is minimised. sigmoid: DPO; ipo: IPO; simpo and orpo need no reference."""
    reference: Annotated[MaybeStr, _filled("the weights of --pretrained", "PATH")] = None
    """The model that answers are compared with, for sigmoid and ipo; none: their log-probabilities count as they are."""
    epochs: float = 1.0
    """How often the pairs are gone through when --steps is not given."""
    max_dropped: float = 0.05
    """Refuse files of which more than this part of the rows teaches nothing and would be dropped."""
    template: Annotated[str, arg(metavar="auto|chatml|FILE")] = "auto"
    """How turns are written. auto: the model's own way, else chatml, whose two tokens are added to the tokenizer; or a file of Jinja."""


@dataclass(frozen=True)
class PairTrainingFlags(option_flags("PairTrainingFlags", pair_training_options())):
    """How it is trained; one step sees --batch-size sequences of --seq-len tokens, each of several pairs."""


@dataclass(frozen=True)
class DpoFlags(TrainFlags):
    """Teach a model which of two answers is better, by pairs. Give the same command again to continue a run that was stopped."""

    data: OmitArgPrefixes[PairDataFlags] = field(default_factory=PairDataFlags)
    run: OmitArgPrefixes[RunFlags] = field(default_factory=RunFlags)
    training: OmitArgPrefixes[PairTrainingFlags] = field(default_factory=PairTrainingFlags)
    chats: OmitArgPrefixes[PairFlags] = field(default_factory=PairFlags)


def _of_any(name: str, *classes: type) -> Any:
    """The flags of a group in any command; their defaults are those of the commands."""
    found = {f.name: (f.name, f.type, field(default=None, metadata=f.metadata)) for each in classes for f in dataclasses.fields(each)}
    return dataclasses.make_dataclass(name, found.values(), frozen=True)


GROUPS = {
    "data": DataFlags,
    "run": TaughtRunFlags,
    "model": ModelFlags,
    "mixers": MixerFlags,
    "training": TrainingFlags,
    "report": ReportFlags,
}
ALL_GROUPS: dict[str, Any] = GROUPS | {  # those of single commands among them
    "training": option_flags("AnyTrainingFlags", [*training_options(), *objective_options("train"), *objective_options("dpo")]),
    "chats": _of_any("AnyChatFlags", ChatFlags, PairFlags),
}


def given_names(argv: list[str]) -> frozenset[str]:
    """Field names of the flags in a command line."""
    names = {word[2:].split("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    names |= {name.removeprefix("no_") for name in names}
    return frozenset(names & {f.name for group in ALL_GROUPS.values() for f in dataclasses.fields(group)})


def flag_names() -> list[str]:
    """Every flag, in the order of the help."""
    return [flag(f.name) for group in GROUPS.values() for f in dataclasses.fields(group)]
