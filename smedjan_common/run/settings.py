"""The model and the training that the flags describe, alone or together with a run or weights that they go on from."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from smedjan_common.errors import ConfigError
from smedjan_common.model.config import ModelConfig, ffn_width, parse_pattern
from smedjan_common.model.options import options
from smedjan_common.model.presets import PRESETS, VOCAB_MULTIPLE
from smedjan_common.model.rope import original_length
from smedjan_common.run.data import check_data_flags, trains_tokenizer
from smedjan_common.run.described import described_model, feed_forward
from smedjan_common.run.flags import TrainFlags, TrainingFlags
from smedjan_common.run.options import check_options, check_report_options, check_training_options
from smedjan_common.run.resume import difference
from smedjan_common.training.config import TrainConfig, default_lr
from smedjan_common.training.mesh import check_mesh, parse_mesh
from smedjan_common.training.optimizers import OPTIMIZERS

_SHAPE_FREE = tuple(name for name, option in options(ModelConfig).items() if option.shape_free)


def new_model(flags: TrainFlags, vocab_size: int) -> ModelConfig:
    """The model that the flags describe. Raises ConfigError."""
    kept = {name: getattr(flags.model, name) for name in ("rope_base", "rope_scaling", "rope_factor", "rope_original_len", "init_std")}
    return described_model(flags.model.size, flags.model, flags.mixers, vocab_size, flags.training.seq_len, **kept)


def check_flags(flags: TrainFlags, given: frozenset[str]) -> None:
    """Raises ConfigError for the flags of a new run that no text could make right, before its text is tokenised, which may take hours."""
    check_data_flags(flags.data, given)
    check_report_options(flags.report, given)
    if flags.run.pretrained:  # pretrained_model does the rest, when the weights' model is known
        return
    model = new_model(flags, flags.data.vocab_size)
    train = _likely_training(flags, given, model)
    train.check_model(model)
    check_options(model, given)
    check_training_options(train, model, given)
    if mesh := parse_mesh(flags.run.mesh):
        fits = VOCAB_MULTIPLE * mesh.tensor  # a tokenizer that is there already is not read yet
        shared = model if trains_tokenizer(flags.data) else dataclasses.replace(model, vocab_size=fits)
        check_mesh(mesh, shared, train.batch_size, train.grad_accum)


def _likely_training(flags: TrainFlags, given: frozenset[str], model: ModelConfig) -> TrainConfig:
    """How to train, the number of steps aside, which the text decides where it is not given."""
    return train_config(flags.training, given, None, model.dim, max(1, flags.training.warmup or 1), "float32")


def same_model(base: ModelConfig, flags: TrainFlags, given: frozenset[str]) -> ModelConfig:
    """`base` as the given flags say it should be: equal to it when they agree."""
    changes: dict[str, Any] = {}
    model = flags.model
    if "size" in given and model.size != "custom":
        ModelConfig.preset(model.size)  # refuses an unknown name
        changes |= PRESETS[model.size]._asdict()
    names, values = {f.name for f in dataclasses.fields(base)}, {**vars(model), **vars(flags.mixers)}
    changes |= {name: values[name] for name in names & given if values.get(name) is not None}
    if "mixer" in given:
        changes["mixer"] = parse_pattern(model.mixer)
    if "ffn" in given or ("experts" in given and bool(flags.mixers.experts) != ("experts" in base.ffn)):
        changes["ffn"] = feed_forward(flags.model, flags.mixers)
    if "ffn_mult" in given and model.ffn_mult is not None:
        changes["ffn_dim"] = ffn_width(changes.get("dim", base.dim), model.ffn_mult)
    return dataclasses.replace(base, **changes)


def pretrained_flags(flags: TrainFlags, given: frozenset[str], base: ModelConfig) -> TrainFlags:
    """`flags` of a new run from weights of `base`; --seq-len is their context where it is not given, extended where the flags extend it."""
    if "seq_len" in given:
        return flags
    seq_len, factor = base.context_length, flags.model.rope_factor
    extends = flags.model.rope_scaling != "none" if base.rope_scaling == "none" else "rope_factor" in given
    if extends and 1 < factor < math.inf:  # another factor is refused later
        seq_len = round(original_length(base) * factor)
    return dataclasses.replace(flags, training=dataclasses.replace(flags.training, seq_len=seq_len))


def pretrained_model(base: ModelConfig, path: Path, flags: TrainFlags, given: frozenset[str]) -> ModelConfig:
    """The model of a new run from weights of `base`: as same_model, but what changes no shape may change (_SHAPE_FREE).

    A scaled one says at which context the weights were trained before they were extended: the new context over the factor need not be it.
    """
    model = dataclasses.replace(same_model(base, flags, given), context_length=flags.training.seq_len)
    if model.rope_scaling == "none" and "rope_scaling" in given:
        plain = {name: value for name, value in (("rope_factor", 1.0), ("rope_original_len", 0)) if name not in given}
        model = dataclasses.replace(model, **plain)
    if model.rope_scaling != "none" and "rope_original_len" not in given:
        trained = base.context_length if base.rope_scaling == "none" else original_length(base)
        model = dataclasses.replace(model, rope_original_len=trained)
    if wrong := difference(base, dataclasses.replace(model, **{name: getattr(base, name) for name in _SHAPE_FREE})):
        raise ConfigError(f"The weights of {path} are of another model: {'; '.join(wrong)}.", "", "Leave these flags out.")
    model.validate()
    check_options(model, given)
    check_training_options(_likely_training(flags, given, model), model, given)
    return model


def train_config(flags: TrainingFlags, given: frozenset[str], base: TrainConfig | None, dim: int, epoch: int, dtype: str) -> TrainConfig:
    """How to train: given flags, else the run's own, else the defaults. `epoch`: steps of one pass; `dtype`: what auto means."""
    values = dataclasses.asdict(flags)
    if base is not None:
        values |= {name: value for name, value in dataclasses.asdict(base).items() if name not in given}
    if values["steps"] is None:
        values["steps"] = max(1, epoch)
    optimizer = OPTIMIZERS.get(values["optimizer"], OPTIMIZERS["adamw"])  # an unknown one is refused below
    if values["lr"] is None:
        values["lr"] = default_lr(dim, optimizer.name)
    values |= {name: getattr(optimizer, name) for name in ("beta2", "weight_decay") if values[name] is None}
    if values["warmup"] is None:
        values["warmup"] = min(1000, values["steps"] // 20)
    if "warmup" not in given:
        values["warmup"] = min(values["warmup"], max(values["steps"], 0))  # a resumed run may have become shorter
    if values["dtype"] == "auto":
        values["dtype"] = dtype
    train = TrainConfig(**values)
    train.validate()
    return train
