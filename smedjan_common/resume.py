"""Where a run starts, and which of its settings come from the run that it goes on with.

The rule for users: the same command again goes on. Flags that are given must agree with the run where they define it (the model,
--seq-len, --batch-size, --seed, --optimizer, the tokenizer): a difference is refused and shown. Other given flags (--steps, --lr,
--log-every …) count from here on, with a note. Flags that are not given come from the run.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smedjan_common.checkpoint import CheckpointInfo, find_checkpoints, latest_checkpoint, read_info, verify_checkpoint
from smedjan_common.config import ModelConfig, TrainConfig, default_lr, ffn_width, parse_pattern
from smedjan_common.errors import CheckpointError, ConfigError
from smedjan_common.flags import GROUPS, TrainFlags, TrainingFlags
from smedjan_common.mesh import check_mesh, parse_mesh
from smedjan_common.mixers import FFNS, MIXERS
from smedjan_common.optimizers import OPTIMIZERS
from smedjan_common.presets import PRESETS
from smedjan_common.reporting.metrics import read_rows

FIXED = ("batch_size", "seq_len", "seed", "packing")  # they define the order of the data
RECALLED = {
    "data": None,
    "report": None,
    "run": ("checkpoint_every", "checkpoint_format", "keep", "keep_every"),
}  # groups (fields) that config.json records
_SHAPE_FREE = ("context_length", "rope_base", "rope_scaling", "rope_factor", "rope_original_len", "init_std", "norm_eps")


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
    if start is None and broken:
        raise CheckpointError(
            f"No checkpoint in {folder} can be used.",
            "All of them are damaged.",
            "Give another --checkpoint-dir to start anew, or restore one from a copy.",
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
    model = new_model(flags, flags.data.vocab_size)
    check_options(model, given)
    train_config(flags.training, given, None, model.dim, max(1, flags.training.warmup or 1), "float32").check_model(model)
    if mesh := parse_mesh(flags.run.mesh):
        check_mesh(mesh, model, flags.training)


def check_options(model: ModelConfig, given: frozenset[str]) -> None:
    """Raises ConfigError for a given option of a mixer or feed-forward that the model does not have: it would do nothing."""
    rows = [*MIXERS.values(), *FFNS.values()]
    read = {name for row in rows if row.name in (*model.mixer, *model.ffn) for name in row.options}
    for name in sorted(given & {f.name for f in dataclasses.fields(GROUPS["mixers"])} - read):
        owners = [row.name for row in rows if name in row.options]
        raise ConfigError(
            f"--{name.replace('_', '-')} would do nothing.",
            f"The model has {', '.join(dict.fromkeys((*model.mixer, *model.ffn)))}; the option belongs to {' and '.join(owners)}.",
            "Leave it out" + (f", or add --mixer {owners[0]}." if owners[0] in MIXERS else ", or add --experts 8."),
        )


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
    if {"ffn", "experts"} & given:
        changes["ffn"] = _feed_forward(flags)
    if "ffn_mult" in given and model.ffn_mult is not None:
        changes["ffn_dim"] = ffn_width(changes.get("dim", base.dim), model.ffn_mult)
    return dataclasses.replace(base, **changes)


def pretrained_model(base: ModelConfig, path: Path, flags: TrainFlags, given: frozenset[str]) -> ModelConfig:
    """The model of a new run from weights of `base`: as same_model, but context and rotary settings may change."""
    model = dataclasses.replace(same_model(base, flags, given), context_length=flags.training.seq_len)
    differing = [f.name for f in dataclasses.fields(base) if getattr(base, f.name) != getattr(model, f.name)]
    if wrong := [f"{name}: {getattr(base, name)} there, {getattr(model, name)} now" for name in differing if name not in _SHAPE_FREE]:
        raise ConfigError(f"The weights of {path} are of another model: {'; '.join(wrong)}.", "", "Leave these flags out.")
    model.validate()
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
