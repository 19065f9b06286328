"""`smedjan sizes`: for every preset, or one custom model, exact parameters, FLOPs per token, memory to train and to infer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import arg

from smedjan_common.commands.optional import MaybeFloat, MaybeInt, MaybeStr
from smedjan_common.errors import run_command
from smedjan_common.presets import DEFAULT_VOCAB_SIZE, PRESETS

if TYPE_CHECKING:
    from smedjan_common.config import ModelConfig, TrainConfig


@dataclass(frozen=True)
class SizesFlags:
    """Exact parameter counts of the model sizes, FLOPs per trained token and estimated memory."""

    vocab_size: int = DEFAULT_VOCAB_SIZE
    """Tokens of the vocabulary."""
    size: Annotated[MaybeStr, arg(metavar="|".join((*PRESETS, "custom")), help_behavior_hint="(default: all presets)")] = None
    """Only this size; custom needs --dim, --layers and --heads."""
    dim: Annotated[MaybeInt, arg(help_behavior_hint="")] = None
    """Width of the residual stream."""
    layers: Annotated[MaybeInt, arg(help_behavior_hint="")] = None
    """Number of blocks."""
    heads: Annotated[MaybeInt, arg(help_behavior_hint="")] = None
    """Number of query heads."""
    kv_heads: Annotated[MaybeInt, arg(help_behavior_hint="(default: --heads)")] = None
    """Number of key/value heads."""
    ffn_mult: Annotated[MaybeFloat, arg(help_behavior_hint="(default: 2.67)")] = None
    """Feed-forward width over --dim."""
    mixer: str = "attention"
    """Sequence mixers, a pattern over the depth."""
    experts: int = 0
    """Experts of a feed-forward. 0: one dense feed-forward."""
    experts_per_token: int = 2
    """Experts that each token is sent to."""
    shared_experts: int = 0
    """Experts that see every token, besides the routed ones."""
    expert_dim: Annotated[int, arg(help_behavior_hint="(default: the feed-forward width)")] = 0
    """Width of one expert."""
    batch_size: int = 16
    """Sequences of a training step, for the memory."""
    seq_len: int = 512
    """Tokens of a sequence, for memory and FLOPs."""
    dtype: Annotated[str, arg(metavar="float32|bfloat16")] = "bfloat16"
    """Precision of the computation, for the memory."""
    gradient_checkpointing: Annotated[str, arg(metavar="none|dots|full")] = "none"
    """What is recomputed, for the memory."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit code."""
    flags = tyro.cli(SizesFlags, prog="smedjan sizes", args=argv, config=(tyro.conf.DisallowNone,))
    return run_command(lambda: _sizes(flags))


def _sizes(flags: SizesFlags) -> int:
    from smedjan_common.config import TrainConfig

    train = TrainConfig(
        steps=1,
        batch_size=flags.batch_size,
        seq_len=flags.seq_len,
        lr=1.0,
        dtype=flags.dtype,
        gradient_checkpointing=flags.gradient_checkpointing,
    )
    train.validate()
    rows = [row(name, model, train) for name, model in models(flags).items()]
    if flags.json:
        import json

        print(json.dumps(rows, indent=1))
    else:
        print(table(rows, train, flags.vocab_size))
    return 0


def models(flags: SizesFlags) -> "dict[str, ModelConfig]":
    """Name -> model, as the flags ask. Raises ConfigError."""
    from smedjan_common.config import ModelConfig, parse_pattern
    from smedjan_common.errors import ConfigError

    changes: dict[str, Any] = {"mixer": parse_pattern(flags.mixer), "context_length": flags.seq_len}
    changes |= {n: value for n in ("dim", "layers", "heads", "kv_heads", "ffn_mult") if (value := getattr(flags, n)) is not None}
    options = {name: getattr(flags, name) for name in ("experts_per_token", "shared_experts", "expert_dim")}
    if flags.experts:
        changes |= {"ffn": ("experts",), "experts": flags.experts, **options}
    elif idle := [name for name, value in options.items() if value != getattr(SizesFlags, name)]:
        raise ConfigError(f"--{idle[0].replace('_', '-')} would do nothing.", "--experts is not given.", "Add --experts 8, say.")
    shaped = any(name in changes for name in ("dim", "layers", "heads"))
    size = flags.size or ("custom" if shaped else None)
    if size != "custom":
        return {name: ModelConfig.preset(name, flags.vocab_size, **changes) for name in ([size] if size else PRESETS)}
    if missing := [f"--{name}" for name in ("dim", "layers", "heads") if name not in changes]:
        raise ConfigError(f"--size custom lacks {', '.join(missing)}.", "It has no values of its own.", "Give --dim, --layers and --heads.")
    return {"custom": ModelConfig.build(vocab_size=flags.vocab_size, **changes)}


def row(name: str, model: "ModelConfig", train: "TrainConfig") -> dict[str, Any]:
    """The figures of one model; bytes and FLOPs as whole numbers."""
    from smedjan_common.flops import active_params, train_flops_per_token
    from smedjan_common.memory import inference_bytes, training_bytes

    return {
        "size": name,
        "parameters": model.num_params(),
        "active_parameters": active_params(model),
        "dim": model.dim,
        "layers": model.layers,
        "heads": model.heads,
        "kv_heads": model.kv_heads,
        "ffn_dim": model.ffn_dim,
        "vocab_size": model.vocab_size,
        "train_flops_per_token": train_flops_per_token(model, train.seq_len),
        "training_bytes": training_bytes(model, train),
        "inference_bytes": inference_bytes(model, 1, train.seq_len, train.dtype),
    }


_COLUMNS = ("dim", "layers", "heads", "feed-forward", "FLOP/token", "to train", "to infer")


def table(rows: list[dict[str, Any]], train: "TrainConfig", vocab_size: int) -> str:
    """Aligned text."""
    from smedjan_common.reporting.console import count, size

    routed = any(r["active_parameters"] != r["parameters"] for r in rows)
    cells: list[list[str]] = [["size", "parameters", *(["for a token"] if routed else []), *_COLUMNS]]
    for r in rows:
        heads = str(r["heads"]) if r["heads"] == r["kv_heads"] else f"{r['heads']}/{r['kv_heads']}"
        counts = [r["parameters"], r["active_parameters"]] if routed else [r["parameters"]]
        figures = [*(f"{n:,}" for n in counts), str(r["dim"]), str(r["layers"]), heads, str(r["ffn_dim"])]
        cells.append([r["size"], *figures, count(r["train_flops_per_token"]), size(r["training_bytes"]), size(r["inference_bytes"])])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    columns = [str.ljust, *[str.rjust] * (len(widths) - 1)]
    lines = ["  ".join(put(cell, width) for put, cell, width in zip(columns, line, widths, strict=True)) for line in cells]
    recomputing = "" if train.gradient_checkpointing == "none" else f", gradient checkpointing {train.gradient_checkpointing}"
    note = (
        f"vocabulary {vocab_size}; memory is estimated: {train.dtype} computation, to train with {train.batch_size} x {train.seq_len}"
        f" tokens a step (AdamW, float32 masters{recomputing}), to infer with one sequence of {train.seq_len}"
    )
    return "\n".join([*lines, "", note])
