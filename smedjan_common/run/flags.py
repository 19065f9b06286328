"""The flags of training, one frozen dataclass for both backends. Docstrings under the fields are the help.

`parse` also tells which flags were given: on a resumed run those that were not come from the run itself (recorded.py).
tests/fixtures/train_flags.txt lists the flags, so that drift is noticed.
"""

import dataclasses
import sys
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro
from tyro.conf import OmitArgPrefixes, arg

from smedjan_common.command_line import parse as parse_flags
from smedjan_common.model.ffns import FFNS
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.presets import DEFAULT_FFN_MULT, DEFAULT_VOCAB_SIZE, PRESETS
from smedjan_common.model.shape import ROPE_SCALINGS
from smedjan_common.optional import MaybeFloat, MaybeInt, MaybeStr
from smedjan_common.training.config import ATTENTION, CHECKPOINT_FORMATS, DTYPES, GRADIENT_CHECKPOINTING, PACKING
from smedjan_common.training.optimizers import OPTIMIZERS
from smedjan_common.training.schedule import SCHEDULES


def _filled(default: str, metavar: str) -> Any:
    """A flag whose default is worked out from the others; the help says how."""
    return arg(metavar=metavar, help_behavior_hint=f"(default: {default})")


def _by_optimizer(setting: str) -> Any:
    """A flag whose default stands in the row of the optimizer."""
    values = {name: getattr(row, setting) for name, row in OPTIMIZERS.items()}
    usual = values["adamw"]
    others = "".join(f"; {name}: {value:g}" for name, value in values.items() if value != usual)
    return _filled(f"{usual:g}{others}", "FLOAT")


def _one_of(*names: str) -> Any:
    """A flag that takes one name of a table; the configuration refuses others and lists near ones."""
    return arg(metavar="|".join(names))


@dataclass(frozen=True)
class DataFlags:
    """What to train on."""

    dataset: Annotated[tuple[str, ...], arg(metavar="FILE ...", help_behavior_hint="(required for a new run)")] = ()
    """A token file (.bin, from `smedjan prepare`), several mixed by weight (a.bin:0.7 b.bin:0.3), or text and JSONL files: those are
    tokenised once, into CHECKPOINT_DIR/data."""
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

    checkpoint_dir: Annotated[MaybeStr, _filled("runs/DATASET-SIZE", "DIR")] = None
    """The run folder: config.json, metrics.jsonl, step-*/, final/, loss.png."""
    checkpoint_every: int = 500
    """Save a checkpoint every this many steps; always at the end and when stopped. 0: only then."""
    checkpoint_format: Annotated[str, _one_of(*CHECKPOINT_FORMATS)] = "neutral"
    """neutral: every backend goes on from it. orbax: JAX's own, written shard by shard; `convert` makes a neutral one of it."""
    keep: int = 3
    """Keep this many newest checkpoints. 0: all."""
    keep_every: int = 0
    """Keep every checkpoint whose step is a multiple of this for ever, beside those of --keep. 0: none."""
    resume: Annotated[str, arg(metavar="auto|never|PATH")] = "auto"
    """auto: go on from the newest complete checkpoint of the run folder, or start. never: refuse a folder that has a run.
    PATH: go on from this checkpoint. Flags that are not given come from the run that is resumed."""
    pretrained: Annotated[MaybeStr, arg(metavar="PATH", help_behavior_hint="")] = None
    """Start a new run from the weights and the tokenizer of this checkpoint (new optimizer, step 0)."""
    backend: Annotated[str, _one_of("auto", "jax", "mlx")] = "auto"
    """The framework. auto: MLX on Apple Silicon, else JAX."""
    mesh: Annotated[str, arg(metavar="AXIS=N,...", help_behavior_hint="(default: auto, the batch over all GPUs)")] = "auto"
    """How the run is spread over devices (JAX): data=2 shares out the batch, fsdp=2 the train state too, tensor=2 heads, feed-forward
    and vocabulary; data=2,fsdp=4 takes eight devices. It changes no result, and may be another one when the run goes on."""
    dry_run: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Say what would be done, write nothing."""


@dataclass(frozen=True)
class ModelFlags:
    """The model."""

    size: Annotated[str, _one_of(*PRESETS, "custom")] = "tiny"
    """A preset (see `smedjan sizes`); the flags below replace single values of it, and custom needs the first three."""
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
    rope_base: float = 10000.0
    """Base of the rotary frequencies."""
    rope_scaling: Annotated[str, _one_of(*ROPE_SCALINGS)] = "none"
    """Stretch positions to extend the context of --pretrained."""
    rope_factor: float = 1.0
    """How much --rope-scaling stretches."""
    rope_original_len: Annotated[int, arg(help_behavior_hint="(default: that of --pretrained; else the context over the factor)")] = 0
    """The context that the weights were trained with."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""


@dataclass(frozen=True)
class MixerFlags:
    """Options of single mixers and of the experts; each counts only where its mixer is in --mixer."""

    qk_norm: bool = False
    """attention, block-sparse: RMSNorm over each head of the queries and keys (Qwen3)."""
    window: int = 0
    """attention: see only this many newest positions. 0: all."""
    linear_decay: Annotated[str, _one_of(*MIXERS["linear"].own["linear_decay"].choices)] = "scalar"
    """linear: how the state fades. scalar: by a gate on the token, one per head; fixed: RetNet's rates."""
    linear_feature_map: Annotated[str, _one_of(*MIXERS["linear"].own["linear_feature_map"].choices)] = "identity"
    """linear: what is done to queries and keys."""
    linear_normalizer: Annotated[str, _one_of(*MIXERS["linear"].own["linear_normalizer"].choices)] = "rmsnorm"
    """linear: how the output is normalised; denominator needs --linear-feature-map elu1."""
    ssm_state: int = 128
    """ssm: state size, N."""
    ssm_head_dim: int = 64
    """ssm: head size, P."""
    ssm_expand: int = 2
    """ssm: inner width over --dim."""
    ssm_groups: int = 1
    """ssm: groups of heads that share B and C."""
    conv_width: int = 4
    """ssm, gated-deltanet: width of the causal convolution."""
    mla_kv_rank: Annotated[int, _filled("4 heads' width", "INT")] = 0
    """mla: rank of the joint compression of keys and values."""
    mla_q_rank: Annotated[int, _filled("queries are not compressed", "INT")] = 0
    """mla: rank of the compression of queries."""
    mla_rope_dim: Annotated[int, _filled("half a head", "INT")] = 0
    """mla: features of a head that are turned by position."""
    block_size: int = 64
    """block-sparse: positions of a block."""
    block_topk: int = 4
    """block-sparse: blocks that a query sees, its own included."""
    rwkv_head_dim: int = 64
    """rwkv: head size."""
    experts: int = 0
    """Experts of a feed-forward. 0: one dense feed-forward."""
    experts_per_token: int = 2
    """Experts that each token is sent to."""
    shared_experts: int = 0
    """Experts that see every token, besides the routed ones."""
    expert_dim: Annotated[int, _filled("the feed-forward width", "INT")] = 0
    """Width of one expert."""
    router: Annotated[str, _one_of(*FFNS["experts"].own["router"].choices)] = "softmax"
    """softmax: balanced by a loss (--balance-loss). bias: sigmoid scores, balanced without a loss by a bias on the choice."""


@dataclass(frozen=True)
class TrainingFlags:
    """How it is trained; one step sees --batch-size sequences of --seq-len tokens."""

    steps: Annotated[MaybeInt, _filled("one pass over the data", "INT")] = None
    """Number of optimizer steps."""
    batch_size: int = 16
    """Sequences of one optimizer step, all --grad-accum parts together."""
    seq_len: int = 512
    """Tokens of one sequence; the model's context length. With --pretrained the default is the context of the weights."""
    lr: Annotated[MaybeFloat, _filled("by width: 3e-4 * sqrt(4096 / dim); for lion a fifth of it", "FLOAT")] = None
    """Peak learning rate."""
    warmup: Annotated[MaybeInt, _filled("5% of --steps, at most 1000", "INT")] = None
    """Steps over which the learning rate rises."""
    lr_schedule: Annotated[str, _one_of(*SCHEDULES)] = "cosine"
    """Course of the learning rate after the warm-up."""
    min_lr_ratio: float = 0.1
    """Last learning rate over the peak."""
    decay_fraction: float = 0.2
    """The part of the run in which wsd decays."""
    optimizer: Annotated[str, _one_of(*OPTIMIZERS)] = "adamw"
    """muon orthogonalises the steps of hidden matrices and leaves the other tensors to adamw; lion keeps one moment instead of two."""
    beta1: float = 0.9
    """Decay of the first moment; lion: weight of the momentum in its step."""
    beta2: Annotated[MaybeFloat, _by_optimizer("beta2")] = None
    """Decay of the second moment; lion: of the momentum."""
    eps: float = 1e-8
    """Added to the root of the second moment; muon: to the norm of the momentum."""
    muon_momentum: float = 0.95
    """muon: decay of the momentum."""
    muon_steps: int = 5
    """muon: Newton-Schulz iterations of a step."""
    muon_nesterov: bool = True
    """muon: look one step ahead along the momentum."""
    weight_decay: Annotated[MaybeFloat, _by_optimizer("weight_decay")] = None
    """Decoupled weight decay of the matrices."""
    clip_norm: float = 1.0
    """Clip the global norm of the gradients to this. 0: never."""
    grad_accum: int = 1
    """Compute the gradients in this many parts, one after the other, to save memory; the result is the same."""
    gradient_checkpointing: Annotated[str, _one_of(*GRADIENT_CHECKPOINTING)] = "none"
    """Recompute activations to save memory: dots keeps the matrix products, full keeps only the inputs of blocks."""
    dtype: Annotated[str, _one_of("auto", *DTYPES)] = "auto"
    """Precision of the computation; parameters and optimizer are float32. auto: bfloat16 on a GPU, float32 on a CPU."""
    attention: Annotated[str, _one_of(*ATTENTION)] = "auto"
    """Implementation of attention. fused fails where there is none; auto takes the best there is."""
    deterministic: bool = False
    """The same bits every time on a GPU too, where it is slower (docs/checkpoints.md); on a CPU they always are."""
    chunk_size: int = 64
    """Positions that mixers of linear cost take at once: a matter of speed, the result is the same."""
    mask_documents: bool = False
    """Keep documents apart: nothing is read across the end of a document inside a sequence."""
    packing: Annotated[str, _one_of(*PACKING)] = "windows"
    """How sequences are cut. windows: the text as one stream; documents: whole documents, rows filled by best fit."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax's denominator in the loss (PaLM: 1e-4). 0: off."""
    balance_loss: float = 0.01
    """experts, router softmax: weight of the loss that spreads tokens over experts."""
    router_z_loss: float = 1e-3
    """experts, router softmax: weight of the router's own z-loss."""
    router_bias_rate: float = 1e-3
    """experts, router bias: how far a step moves the bias of an expert."""
    seed: int = 0
    """Fixes the initial weights, the order of the data and the samples."""


@dataclass(frozen=True)
class ReportFlags:
    """What is told on the way."""

    log_every: int = 10
    """A line of metrics every this many steps; the first and the last step always."""
    eval_every: int = 250
    """Validation loss every this many steps and at the end. 0: never."""
    eval_batches: int = 20
    """Batches of one validation, always the same ones."""
    sample_every: int = 0
    """Write a sample every this many steps, into the console and CHECKPOINT_DIR/samples. 0: never."""
    sample_prompt: str = ""
    """What samples go on from."""
    sample_tokens: int = 128
    """Length of a sample."""


@dataclass(frozen=True)
class TrainFlags:
    """Train a language model from raw text. A run that was stopped goes on when the same command is given again."""

    data: OmitArgPrefixes[DataFlags] = field(default_factory=DataFlags)
    run: OmitArgPrefixes[RunFlags] = field(default_factory=RunFlags)
    model: OmitArgPrefixes[ModelFlags] = field(default_factory=ModelFlags)
    mixers: OmitArgPrefixes[MixerFlags] = field(default_factory=MixerFlags)
    training: OmitArgPrefixes[TrainingFlags] = field(default_factory=TrainingFlags)
    report: OmitArgPrefixes[ReportFlags] = field(default_factory=ReportFlags)


GROUPS = {"data": DataFlags, "run": RunFlags, "model": ModelFlags, "mixers": MixerFlags, "training": TrainingFlags, "report": ReportFlags}


def parse(argv: list[str] | None = None, prog: str = "smedjan train") -> tuple[TrainFlags, frozenset[str]]:
    """The flags and the names of those that were given. Exits with 2 on a flag that is not known."""
    argv = sys.argv[1:] if argv is None else list(argv)
    example = "smedjan train --dataset my.txt --checkpoint-dir runs/mine --size tiny --steps 400"
    return parse_flags(TrainFlags, prog, argv, example), given_names(argv)


def given_names(argv: list[str]) -> frozenset[str]:
    """Field names of the flags in a command line."""
    names = {word[2:].split("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    names |= {name.removeprefix("no_") for name in names}
    return frozenset(names & {f.name for group in GROUPS.values() for f in dataclasses.fields(group)})


def flag_names() -> list[str]:
    """Every flag, in the order of the help."""
    return ["--" + f.name.replace("_", "-") for group in GROUPS.values() for f in dataclasses.fields(group)]
