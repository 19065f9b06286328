"""Where a run starts, and which of its settings come from the run that it goes on with.

The rule for users: the same command again goes on. Flags that are given must agree with the run where they define it (the model,
--seq-len, --batch-size, --seed, --optimizer, the tokenizer): a difference is refused and shown. Other given flags (--steps, --lr,
--log-every …) count from here on, with a note. Flags that are not given come from the run.
"""

import dataclasses
import math
import typing
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smedjan_common.checkpoint import CheckpointInfo, difference, find_checkpoints, latest_checkpoint, read_info, verify_checkpoint
from smedjan_common.checkpoint.directory import check_formats
from smedjan_common.config import CHECKPOINT_FORMATS, ModelConfig, TrainConfig, default_lr, ffn_width, parse_pattern
from smedjan_common.errors import CheckpointError, ConfigError
from smedjan_common.flags import GROUPS, TrainFlags, TrainingFlags
from smedjan_common.mesh import check_mesh, parse_mesh
from smedjan_common.optimizers import OPTIMIZERS
from smedjan_common.options import check_options, check_report_options, check_training_options
from smedjan_common.presets import PRESETS, VOCAB_MULTIPLE
from smedjan_common.reporting.metrics import read_rows
from smedjan_common.rope import original_length
from smedjan_common.run_data import check_data_flags, trains_tokenizer

if TYPE_CHECKING:
    from smedjan_common.tokenizer import Tokenizer

FIXED = ("batch_size", "seq_len", "seed", "packing")  # they define the order of the data
RECALLED = {
    "data": None,
    "report": None,
    "run": ("checkpoint_every", "checkpoint_format", "keep", "keep_every"),
}  # groups (fields) that config.json records
_SHAPE_FREE = (
    *("context_length", "rope_base", "rope_scaling", "rope_factor", "rope_original_len", "init_std", "norm_eps"),
    *("window", "block_size", "block_topk"),
)


def find_start(folder: Path, resume: str, say: Callable[[str], None]) -> Path | None:
    """The step checkpoint to go on from, its hashes verified; None for a new run. Raises CheckpointError rather than overwrite a run."""
    if resume == "never":
        return _refuse_a_run(folder)
    if resume == "auto":
        return _newest(folder, say)
    info = read_info(resume)
    verify_checkpoint(info.path)
    others = [found for found in find_checkpoints(folder) if found.path.resolve() != info.path.resolve()]
    inside = info.path.resolve().parent == folder.resolve()
    check_formats(folder, info.path if inside else None)
    if newer := [found for found in others if found.step > info.step or not inside]:
        raise CheckpointError(
            f"{folder} has checkpoints that {info.path} would not go on from, such as {newer[-1].path.name}.",
            "They would mix with those of this run.",
            "Give another --checkpoint-dir, or move them away.",
        )
    return folder / info.path.name if inside else info.path


def _newest(folder: Path, say: Callable[[str], None]) -> Path | None:
    broken: list[str] = []
    start = latest_checkpoint(folder, on_skip=broken.append)
    for line in broken:
        say(f"note: {line}")
    check_formats(folder, start)
    if start is None and broken:
        raise CheckpointError(
            f"No checkpoint in {folder} can be used.",
            "All of them are damaged.",
            "Give another --checkpoint-dir to start anew, or restore one from a copy.",
        )
    if start is None and (folder / "final").exists():
        raise CheckpointError(
            f"{folder} has a finished run without its step checkpoints.",
            "final/ holds weights only, nothing to go on from, and a new run would overwrite it.",
            f"Give another --checkpoint-dir, or start there from the weights: --pretrained {folder / 'final'} --checkpoint-dir NEW.",
        )
    if start is None and read_rows(folder):
        say(f"note: the run in {folder} ended before its first checkpoint; it starts again.")
    return start


def _refuse_a_run(folder: Path) -> None:
    broken: list[str] = []
    if find_checkpoints(folder, on_skip=broken.append) or broken or (folder / "final").exists() or read_rows(folder):
        raise CheckpointError(
            f"{folder} already has a run.",
            "--resume never starts anew and overwrites nothing.",
            "Give another --checkpoint-dir, remove this one, or take --resume auto to go on.",
        )


def check_recorded(file: Path, recorded: dict[str, Any]) -> None:
    """Raises ConfigError for what `file` of a run records and a run cannot have recorded: flags and datasets of wrong types."""
    fix = "Restore it from a copy, or remove it and give the flags of the run again."
    flags = recorded.get("flags")
    if not isinstance(flags, dict | None):
        raise ConfigError(f"{file} is damaged, or was edited.", f'Its "flags" is {flags!r}, not a JSON object.', fix)
    for name, hint in _recorded_types().items():
        if flags and name in flags and not _is_of(hint, flags[name]):
            raise ConfigError(f"{file} is damaged, or was edited.", f'Its "{name}" in "flags" is {flags[name]!r}.', fix)
    if flags and (kind := flags.get("checkpoint_format", "neutral")) not in CHECKPOINT_FORMATS:
        raise ConfigError(f"{file} has an unknown checkpoint_format.", f"It is {kind!r}; known: {', '.join(CHECKPOINT_FORMATS)}.", fix)
    for name in ("dataset", "val_dataset"):
        if not is_dataset(recorded.get(name)):
            raise ConfigError(f"{file} is damaged, or was edited.", f'Its "{name}" does not describe token files.', fix)


def _recorded_types() -> dict[str, Any]:
    types = {group: typing.get_type_hints(GROUPS[group]) for group in RECALLED}
    return {name: types[group][name] for group, only in RECALLED.items() for name in only or types[group]}


def _is_of(hint: Any, value: Any) -> bool:
    """Whether a value of JSON is of a flag's type."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        return isinstance(value, list) and all(_is_of(parts[0], part) for part in value)
    if parts:  # a union
        return any(_is_of(part, value) for part in parts)
    return type(value) in (int, float) and abs(value) < math.inf if hint is float else type(value) is hint


def is_dataset(data: Any) -> bool:
    """Whether `data` is as RunFolder describes a token file or a mixture; None: that there is none."""
    if not isinstance(data, dict):
        return data is None
    files = data.get("files", [data])
    if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
        return False
    return all(isinstance(file.get("path"), str) and _is_of(float, file.get("weight", 1.0)) for file in files)


def recall(flags: TrainFlags, given: frozenset[str], recorded: dict[str, Any]) -> TrainFlags:
    """`flags` with what was not given taken from a run's recorded flags."""
    groups = {}
    for group in RECALLED:
        values = getattr(flags, group)
        names = [f.name for f in dataclasses.fields(values) if f.name in to_record(flags)]
        known = {name: _tuple(recorded[name]) for name in names if name not in given and name in recorded}
        if group == "data" and "dataset" in given:
            known.pop("val_dataset", None)  # it belongs to the other dataset
        groups[group] = dataclasses.replace(values, **known)
    return dataclasses.replace(flags, **groups)


def to_record(flags: TrainFlags) -> dict[str, Any]:
    """The flags that config.json records."""
    names = {group: only or [f.name for f in dataclasses.fields(GROUPS[group])] for group, only in RECALLED.items()}
    return {name: getattr(getattr(flags, group), name) for group, fields in names.items() for name in fields}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def new_model(flags: TrainFlags, vocab_size: int) -> ModelConfig:
    """The model that the flags describe. Raises ConfigError."""
    model = flags.model
    values = {name: value for name in ("dim", "layers", "heads", "kv_heads", "ffn_mult") if (value := getattr(model, name)) is not None}
    values |= {name: getattr(model, name) for name in ("rope_base", "rope_scaling", "rope_factor", "rope_original_len", "init_std")}
    values |= {**dataclasses.asdict(flags.mixers), "mixer": parse_pattern(model.mixer), "context_length": flags.training.seq_len}
    values["ffn"] = _feed_forward(flags)
    if model.size != "custom":
        return ModelConfig.preset(model.size, vocab_size, **values)
    if missing := [f"--{name}" for name in ("dim", "layers", "heads") if name not in values]:
        raise ConfigError(f"--size custom lacks {', '.join(missing)}.", "It has no values of its own.", "Give --dim, --layers and --heads.")
    return ModelConfig.build(vocab_size=vocab_size, **values)


def _feed_forward(flags: TrainFlags) -> tuple[str, ...]:
    return parse_pattern(flags.model.ffn) if flags.model.ffn else ("experts",) if flags.mixers.experts else ("swiglu",)


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
        check_mesh(mesh, model if trains_tokenizer(flags.data) else dataclasses.replace(model, vocab_size=fits), flags.training)


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
        changes["ffn"] = _feed_forward(flags)
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


def check_tokenizer(info: CheckpointInfo, tokenizer: "Tokenizer") -> None:
    """Raises CheckpointError for another tokenizer than that of the weights; where theirs is not known, for one of more tokens."""
    fix = "Give the tokenizer of the weights and a dataset made with it, or train anew, without --pretrained, in another --checkpoint-dir."
    if info.tokenizer_hash and info.tokenizer_hash != tokenizer.hash:
        raise CheckpointError(
            f"{info.path} was trained with another tokenizer: {info.tokenizer_hash[:16]}… there, {tokenizer.hash[:16]}… now.",
            "The same token would mean other text.",
            fix,
        )
    if not info.tokenizer_hash and tokenizer.vocab_size > info.model.vocab_size:
        raise CheckpointError(
            f"The tokenizer has {tokenizer.vocab_size:,} tokens, the model of {info.path} {info.model.vocab_size:,}.",
            "The others would have no row of the embedding.",
            fix,
        )


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


def check_fixed(info: CheckpointInfo, train: TrainConfig) -> None:
    """Raises ConfigError when the order of the data would change."""
    if info.train is None:
        return
    changed = [name for name in FIXED if getattr(info.train, name) != getattr(train, name)]
    if changed:
        pairs = [(name.replace("_", "-"), getattr(info.train, name), getattr(train, name)) for name in changed]
        shown = "; ".join(f"--{name} is {old} there, {new} now" for name, old, new in pairs)
        raise ConfigError(
            f"{info.path} was trained with other settings: {shown}.",
            "They fix which text each step sees, so the run would not be the same.",
            f"Leave them out (--grad-accum saves memory), or start anew from the weights: --pretrained {info.path} --checkpoint-dir NEW.",
        )
