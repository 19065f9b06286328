"""The model and the training that the flags describe, alone or together with a run or weights that they go on from."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from smedjan_common.errors import ConfigError
from smedjan_common.model.config import ModelConfig, ffn_width, parse_pattern
from smedjan_common.model.options import options
from smedjan_common.model.presets import PRESETS
from smedjan_common.model.rope import original_length
from smedjan_common.model.shape import STRETCHING
from smedjan_common.run.asked import Asked
from smedjan_common.run.described import described_model, feed_forward, option_values
from smedjan_common.run.flags import TrainFlags
from smedjan_common.run.option_flags import shape_options
from smedjan_common.run.resume import difference
from smedjan_common.training.adaptation import RATES as ADAPTED
from smedjan_common.training.config import TrainConfig, default_lr
from smedjan_common.training.distillation import ALPHA
from smedjan_common.training.optimizers import OPTIMIZERS
from smedjan_common.training.preferences import PREFERENCES

_RATES = {"sft": 0.2, "dpo": 0.005}  # of the learning rate of pre-training, by command
_SHAPE_FREE = tuple(name for name, option in options(ModelConfig).items() if option.shape_free)


def new_model(flags: TrainFlags, vocab_size: int) -> ModelConfig:
    """The model that the flags describe. Raises ConfigError."""
    values = option_values(flags.model)
    kept = {option.name: values[option.name] for option in shape_options()}
    return described_model(flags.model.size, flags.model, flags.mixers, vocab_size, flags.training.seq_len, **kept)


def same_model(base: ModelConfig, asked: Asked) -> ModelConfig:
    """`base` as the given flags say it should be: equal to it when they agree."""
    changes: dict[str, Any] = {}
    model, mixers = asked.flags.model, asked.flags.mixers
    if asked.is_given("size") and model.size != "custom":
        ModelConfig.preset(model.size)  # refuses an unknown name
        changes |= PRESETS[model.size]._asdict()
    names, values = {f.name for f in dataclasses.fields(base)}, {**vars(model), **option_values(model), **option_values(mixers)}
    changes |= {name: values[name] for name in names & asked.given if values.get(name) is not None}
    if asked.is_given("mixer"):
        changes["mixer"] = parse_pattern(model.mixer)
    if asked.is_given("ffn") or (asked.is_given("experts") and bool(mixers.experts) != ("experts" in base.ffn)):
        changes["ffn"] = feed_forward(model, mixers)
    if asked.is_given("ffn_mult") and model.ffn_mult is not None:
        changes["ffn_dim"] = ffn_width(changes.get("dim", base.dim), model.ffn_mult)
    return dataclasses.replace(base, **changes)


def pretrained_length(base: ModelConfig, asked: Asked) -> int:
    """--seq-len of a new run from weights of `base`: where it is not given their context, extended where the flags extend it."""
    if asked.is_given("seq_len"):
        return asked.value("seq_len")
    factor = asked.value("rope_factor")
    extends = asked.value("rope_scaling") != "none" if base.rope_scaling == "none" else asked.is_given("rope_factor")
    if extends and 1 < factor < math.inf:  # another factor is refused later
        return round(original_length(base) * factor)
    return base.context_length


def pretrained_model(base: ModelConfig, path: Path, asked: Asked) -> ModelConfig:
    """The model of a new run from weights of `base`: as same_model, but what changes no shape may change (_SHAPE_FREE).

    A scaled one says at which context the weights were trained before they were extended: the new context over the factor need not be it.
    """
    model = dataclasses.replace(same_model(base, asked), context_length=asked.value("seq_len"))
    if model.rope_scaling == "none" and asked.is_given("rope_scaling"):
        left = (*(name for name in STRETCHING if name != "rope_scaling"), "rope_global_layers")
        plain = {name: options(ModelConfig)[name].default for name in left if not asked.is_given(name)}
        model = dataclasses.replace(model, **plain)
    if model.rope_scaling != "none" and not asked.is_given("rope_original_len"):
        trained = base.context_length if base.rope_scaling == "none" else original_length(base)
        model = dataclasses.replace(model, rope_original_len=trained)
    if model.rope_scaling != "longrope":
        model = dataclasses.replace(model, rope_short_factors=(), rope_long_factors=())
    if model.rope_scaling != base.rope_scaling and not asked.is_given("rope_attention_factor"):
        model = dataclasses.replace(model, rope_attention_factor=0.0)  # the old scaling's is not the new one's
    lists = ("rope_short_factors", "rope_long_factors")  # which no flag says
    if wrong := difference(base, dataclasses.replace(model, **{name: getattr(base, name) for name in (*_SHAPE_FREE, *lists)})):
        raise ConfigError(f"The weights of {path} are of another model: {'; '.join(wrong)}.", "", "Leave these flags out.")
    model.validate()
    return model


def train_config(asked: Asked, base: TrainConfig | None, objective: str, dim: int, epoch: int) -> TrainConfig:
    """How to train: given flags, else the run's own (`base`), else the defaults. `objective`: a key of OBJECTIVES;
    `epoch`: steps of one pass over the data.

    Where --dtype auto is left to the framework (takes_auto), the dtype is float32 for now.
    """
    values = dataclasses.asdict(asked.flags.training)
    if base is not None:
        values |= {name: value for name, value in dataclasses.asdict(base).items() if not asked.is_given(name)}
        if asked.is_given("epochs") and not asked.is_given("steps"):
            values["steps"] = None
    if values["steps"] is None:
        values["steps"] = max(1, epoch)
    has_teacher = asked.teacher is not None if base is None else base.distill_alpha > 0
    if not has_teacher or values.get("distill_alpha") is None:
        values["distill_alpha"] = ALPHA if has_teacher else 0.0
    optimizer = OPTIMIZERS.get(values["optimizer"], OPTIMIZERS["adamw"])  # an unknown one is refused below
    if values["lr"] is None:
        part = ADAPTED[asked.command] if values["lora_rank"] else _RATES.get(asked.command, 1.0)
        values["lr"] = float(f"{part * default_lr(dim, optimizer.name):.1e}")
    if values["weight_decay"] is None and values["lora_rank"]:
        values["weight_decay"] = 0.0
    values |= {name: getattr(optimizer, name) for name in ("beta2", "weight_decay") if values[name] is None}
    loss = PREFERENCES.get(objective)
    values |= {name: getattr(loss or TrainConfig, name) for name in ("beta", "nll_weight") if values.get(name, 0) is None}
    if values["warmup"] is None:
        values["warmup"] = min(1000, values["steps"] // (10 if asked.chats else 20))
    if not asked.is_given("warmup"):
        values["warmup"] = min(values["warmup"], max(values["steps"], 0))  # a resumed run may have become shorter
    if values["dtype"] == "auto":
        values["dtype"] = "float32"
    train = TrainConfig(**{**values, "objective": objective})
    train.validate()
    return train


def takes_auto(asked: Asked, base: TrainConfig | None) -> bool:
    """Whether the framework says what the dtype is."""
    return asked.value("dtype") == "auto" and (base is None or asked.is_given("dtype"))
