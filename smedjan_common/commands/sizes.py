"""`smedjan sizes`: for every preset, or one custom model, exact parameters, FLOPs per token, memory to train and to infer."""

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro
from tyro.conf import OmitArgPrefixes, arg

from smedjan_common.command_line import parse
from smedjan_common.errors import ConfigError, flag, run_command
from smedjan_common.model.config import ModelConfig
from smedjan_common.model.flops import active_params, train_flops_per_token
from smedjan_common.model.presets import DEFAULT_VOCAB_SIZE, PRESETS
from smedjan_common.optional import MaybeStr
from smedjan_common.run.described import SHAPE, described_model
from smedjan_common.run.flags import LayerFlags, MixerFlags, given_names
from smedjan_common.run.options import check_options
from smedjan_common.training.config import DTYPES, GRADIENT_CHECKPOINTING, TrainConfig
from smedjan_common.training.memory import training_bytes


@dataclass(frozen=True)
class SizesFlags:
    """Exact parameter counts of the model sizes, FLOPs per trained token and estimated memory."""

    vocab_size: int = DEFAULT_VOCAB_SIZE
    """Tokens of the vocabulary."""
    size: Annotated[MaybeStr, arg(metavar="|".join((*PRESETS, "custom")), help_behavior_hint="(default: all presets)")] = None
    """Only this size; custom needs --dim, --layers and --heads."""
    batch_size: int = 16
    """Sequences of a training step, for the memory."""
    seq_len: int = 512
    """Tokens of a sequence, for memory and FLOPs."""
    dtype: Annotated[str, arg(metavar="|".join(DTYPES))] = "bfloat16"
    """Precision of the computation, for the memory."""
    gradient_checkpointing: Annotated[str, arg(metavar="|".join(GRADIENT_CHECKPOINTING))] = "none"
    """What is recomputed, for the memory."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON."""
    model: OmitArgPrefixes[LayerFlags] = field(default_factory=LayerFlags)
    mixers: OmitArgPrefixes[MixerFlags] = field(default_factory=MixerFlags)


def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    flags = parse(
        SizesFlags, "smedjan sizes", argv, "smedjan sizes --vocab-size 32768", "smedjan sizes --size custom --dim 512 --layers 8 --heads 8"
    )
    return run_command(lambda: _sizes(flags, given_names(argv)))


def _sizes(flags: SizesFlags, given: frozenset[str]) -> int:
    names = ("batch_size", "seq_len", "dtype", "gradient_checkpointing")
    train = TrainConfig.from_dict({"steps": 1, "lr": 1.0, **{name: getattr(flags, name) for name in names}})
    rows = [row(name, model, train) for name, model in models(flags, given).items()]
    if flags.json:
        print(json.dumps(rows, indent=1))
    else:
        print(table(rows, train, flags.vocab_size))
    return 0


def models(flags: SizesFlags, given: frozenset[str] = frozenset()) -> dict[str, ModelConfig]:
    """Name -> model, as the flags ask; an option of a mixer that was given and that the models do not have is refused.

    Raises ConfigError.
    """
    names = [flags.size] if flags.size else list(PRESETS)
    if not flags.size and (shape := [name for name in SHAPE if getattr(flags.model, name) is not None]):
        _check_custom(shape)
        names = ["custom"]
    found = {name: described_model(name, flags.model, flags.mixers, flags.vocab_size, flags.seq_len) for name in names}
    if given & {option.name for option in dataclasses.fields(MixerFlags)}:
        for model in found.values():
            check_options(model, given)
    return found


def _check_custom(shape: list[str]) -> None:
    """Raises ConfigError for a model without a size whose shape is not all given."""
    if missing := [flag(name) for name in SHAPE if name not in shape]:
        raise ConfigError(
            f"--{shape[0]} is given without --size.",
            "It does not say which model to change: a preset, or your own, which takes --dim, --layers and --heads.",
            f"Add --size tiny, say, or {' and '.join(missing)}.",
        )


def row(name: str, model: ModelConfig, train: TrainConfig) -> dict[str, Any]:
    """The figures of one model; bytes and FLOPs as whole numbers."""
    from smedjan_common.inference.memory import inference_bytes, state_bytes

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
        "decode_state_bytes": state_bytes(model, 1, train.seq_len, train.dtype),
        "inference_bytes": inference_bytes(model, 1, train.seq_len, train.dtype),
    }


_COLUMNS = ("dim", "layers", "heads", "ffn dim", "FLOP/token", "to train", "state", "to infer")


def table(rows: list[dict[str, Any]], train: TrainConfig, vocab_size: int) -> str:
    """Aligned text."""
    from smedjan_common.reporting.console import count, size

    routed = any(r["active_parameters"] != r["parameters"] for r in rows)
    cells: list[list[str]] = [["size", "parameters", *(["for a token"] if routed else []), *_COLUMNS]]
    for r in rows:
        heads = str(r["heads"]) if r["heads"] == r["kv_heads"] else f"{r['heads']}/{r['kv_heads']}"
        counts = [r["parameters"], r["active_parameters"]] if routed else [r["parameters"]]
        figures = [*(f"{n:,}" for n in counts), str(r["dim"]), str(r["layers"]), heads, str(r["ffn_dim"])]
        memory = [size(r[name]) for name in ("training_bytes", "decode_state_bytes", "inference_bytes")]
        cells.append([r["size"], *figures, count(r["train_flops_per_token"]), *memory])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    columns = [str.ljust, *[str.rjust] * (len(widths) - 1)]
    lines = ["  ".join(put(cell, width) for put, cell, width in zip(columns, line, widths, strict=True)) for line in cells]
    recomputing = "" if train.gradient_checkpointing == "none" else f", gradient checkpointing {train.gradient_checkpointing}"
    note = (
        f"vocabulary {vocab_size}; FLOP/token: of training, forward and backward; memory is estimated for {train.dtype} computation:\n"
        f"to train with {train.batch_size} x {train.seq_len} tokens a step (AdamW, float32 masters{recomputing};"
        f" JAX on a {'CPU' if train.dtype == 'float32' else 'GPU'}),\n"
        f"to infer with one sequence of {train.seq_len}: the weights and the decode state (state)"
    )
    return "\n".join([*lines, "", note])
