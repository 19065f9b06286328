"""Whether a run can go on from a checkpoint: what differs is refused, or only told.

The rule for users: the same command again goes on. Flags that are given must agree with the run where they define it (the model,
--seq-len, --batch-size, --seed, --optimizer, the tokenizer): a difference is refused and shown. Other given flags (--steps, --lr,
--log-every …) count from here on, with a note. Flags that are not given come from the run.
"""

import dataclasses
from typing import Any

from smedjan_common.checkpoint import CheckpointInfo
from smedjan_common.errors import CheckpointError, ConfigError, flag
from smedjan_common.model.config import ModelConfig
from smedjan_common.model.options import options
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.training.adaptation import Adaptation
from smedjan_common.training.config import TrainConfig

FIXED = tuple(name for name, option in options(TrainConfig).items() if option.fixed)


def check_tokenizer(info: CheckpointInfo, tokenizer: Tokenizer) -> None:
    """Raises CheckpointError for another tokenizer than that of the weights; where theirs is not known, for one of more tokens."""
    fix = "Give the tokenizer of the weights and a dataset made with it, or train without --pretrained in another --checkpoint-dir."
    if info.tokenizer_hash and info.tokenizer_hash != tokenizer.hash:
        raise CheckpointError(
            f"{info.path} was trained with another tokenizer: {info.tokenizer_hash[:16]}… there, {tokenizer.hash[:16]}… now.",
            "The same token would mean different text.",
            fix,
        )
    if not info.tokenizer_hash and tokenizer.vocab_size > info.model.vocab_size:
        raise CheckpointError(
            f"The tokenizer has {tokenizer.vocab_size:,} tokens, the model of {info.path} {info.model.vocab_size:,}.",
            "The other tokens would have no embedding.",
            fix,
        )


def check_fixed(info: CheckpointInfo, train: TrainConfig) -> None:
    """Raises ConfigError when the order of the data would change."""
    if info.train is None:
        return
    changed = [name for name in FIXED if getattr(info.train, name) != getattr(train, name)]
    if changed:
        pairs = [(flag(name), getattr(info.train, name), getattr(train, name)) for name in changed]
        shown = "; ".join(f"{name} is {old} there, {new} now" for name, old, new in pairs)
        raise ConfigError(
            f"{info.path} was trained with other settings: {shown}.",
            "They fix which text each step sees, so the run would not be the same.",
            f"Leave them out (--grad-accum saves memory), or start a new run: --pretrained {info.path} --checkpoint-dir NEW.",
        )


def check_same_adapters(info: CheckpointInfo, train: TrainConfig) -> None:
    """Raises ConfigError for other --lora-… than those of the run."""
    assert info.train
    other = [change for change in _differing(info.train, train) if change[0] in options(Adaptation)]
    if other:
        shown = "; ".join(f"{flag(name)} is {_show(a)} there, {_show(b)} now" for name, a, b in other)
        raise ConfigError(
            f"{info.path} has other adapters: {shown}.",
            "What is trained stays the same for the whole of a run.",
            "Leave them out, or start a new run with another --checkpoint-dir.",
        )


_HARMLESS_MODEL = {name for name, option in options(ModelConfig).items() if option.inert}


def difference(old: ModelConfig | TrainConfig, new: ModelConfig | TrainConfig) -> list[str]:
    """One line per field that differs: `dim: 256 in the checkpoint, 512 now`. Empty when they are equal."""
    return [line for name, a, b in _differing(old, new) for line in change(name, a, b, "checkpoint")]


def check_same(info: CheckpointInfo, model: ModelConfig, train: TrainConfig) -> None:
    """Raises CheckpointError, with the difference, for another model or optimizer, or for weights without optimizer state."""
    other = [change for change in _differing(info.model, model) if change[0] not in _HARMLESS_MODEL]
    if other:
        raise CheckpointError(
            f"{info.path} is of another model: {_lines(other)}.",
            "A run goes on with the model it began with.",
            "Give the flags of the checkpoint, or start a new run with another --checkpoint-dir.",
        )
    if info.optimizer is None and info.step > 0:
        raise CheckpointError(
            f"{info.path} holds weights only.", "A run goes on with its optimizer state.", "Resume from a step-*/ directory."
        )
    if info.step and info.train and bool(info.train.ema) != bool(train.ema):
        what = "keeps no average of its weights" if train.ema else f"keeps an average of its weights (--ema {info.train.ema:g})"
        raise CheckpointError(
            f"The run of {info.path} {what}.",
            f"--ema is {train.ema:g} now, and an average goes over all steps of a run.",
            "Leave --ema out, or start a new run: --pretrained with another --checkpoint-dir.",
        )
    if info.optimizer not in {None, "unknown", train.optimizer}:
        raise CheckpointError(
            f"{info.path} has the state of --optimizer {info.optimizer}, not {train.optimizer}.",
            "Each optimizer keeps its own arrays.",
            f"Take --optimizer {info.optimizer}, or start a new run with another --checkpoint-dir.",
        )


def changes(info: CheckpointInfo, model: ModelConfig, train: TrainConfig) -> list[str]:
    """What differs and is allowed (check_same), one line each: `lr: 0.02 in the checkpoint, 0.01 now`."""
    return difference(info.model, model) + (difference(info.train, train) if info.train else [])


def change(name: str, old: Any, new: Any, where: str = "run") -> list[str]:
    """The line of one value that differs; none where it does not."""
    return [f"{name}: {_show(old)} in the {where}, {_show(new)} now"] if old != new else []


def _differing(old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    names = [field.name for field in dataclasses.fields(old)]
    return [(name, a, b) for name in names if (a := getattr(old, name)) != (b := getattr(new, name))]


def _lines(changes: list[tuple[str, Any, Any]]) -> str:
    return "; ".join(f"{name} is {_show(a)} there, {_show(b)} now" for name, a, b in changes)


def _show(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, tuple | list) else "none" if value is None else str(value)
    return text if len(text) <= 40 else text[:16] + "…"
