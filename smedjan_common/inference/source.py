"""A whole model from which another one is made (`smedjan merge`, `smedjan grow`): its weights, none read yet; and writing what was made."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from smedjan_common.backend import Snapshot
from smedjan_common.checkpoint import (
    About,
    CheckpointInfo,
    SavedTokenizer,
    find_checkpoints,
    keeps_averages,
    lazy_weights,
    no_averages,
    verify_weights,
    write_checkpoint,
)
from smedjan_common.checkpoint.lazy import Lazy
from smedjan_common.errors import CheckpointError, flag, notice
from smedjan_common.files.names import MANIFEST, WEIGHTS
from smedjan_common.inference.open import Foreign, open_model
from smedjan_common.model.config import ModelConfig
from smedjan_common.model.options import options
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.training.config import TrainConfig

_INERT = {name for name, option in options(ModelConfig).items() if option.inert}


@dataclass(frozen=True)
class Source:
    """`weights`: by the names of the parameter table, floats. info: None of a Hugging Face directory. averaged: the decay of the moving
    average that they are, 0 for none."""

    path: Path
    model: ModelConfig
    tokenizer: Tokenizer
    weights: Mapping[str, Lazy]
    info: CheckpointInfo | None = None
    averaged: float = 0.0

    @property
    def step(self) -> int:
        """Optimizer steps done; 0 where that is not known."""
        return self.info.step if self.info else 0

    @property
    def train(self) -> TrainConfig | None:
        """How it was trained, as of a whole model; None where that is not known."""
        return self.info.train.of_whole_model() if self.info and self.info.train else None

    def described(self) -> dict[str, Any]:
        """What a checkpoint says of what it was made of."""
        known = {"step": self.step, "sha256": self.info.files[WEIGHTS].sha256} if self.info else {}
        return {"path": str(self.path)} | known | ({"averaged": self.averaged} if self.averaged else {})

    def verify(self) -> None:
        """Compare every byte of the weights with their hash, where there is one. Raises CheckpointError."""
        if self.info:
            verify_weights(self.info, averaged=self.averaged > 0)


def open_source(path: str | Path) -> Source:
    """The newest weights under `path`: a run folder, step-*/, final/, or a Hugging Face directory. No framework is imported.

    Raises CheckpointError for none, for a backend's own checkpoint, and for quantised weights; what `open_model` raises.
    """
    info, tokenizer = open_model(path)
    if isinstance(info, Foreign):
        if info.format != "hf":
            why, fix = "They are to infer with: only whole weights can become another model.", "Give the model that they were made from."
            raise CheckpointError(f"The weights of {path} are quantised.", why, fix)
        return Source(info.path, info.model, tokenizer, info.weights)
    return Source(info.path, info.model, tokenizer, lazy_weights(info), info)


def open_averages(path: str | Path) -> Source:
    """The averages that the newest step checkpoint under `path` keeps of its weights (--ema). Raises CheckpointError where it keeps none,
    and as open_source."""
    found = find_checkpoints(path, on_skip=notice) if Path(path).is_dir() and not (Path(path) / MANIFEST).is_file() else []
    source = open_source(found[-1].path if found else path)
    info = source.info
    if not info or not keeps_averages(info):
        raise no_averages(source.path)
    assert info.train
    return dataclasses.replace(source, weights=lazy_weights(info, averaged=True), averaged=info.train.ema)


def check_alike(first: Source, other: Source) -> None:
    """Raises CheckpointError, with the first difference, for two models whose tensors do not mean the same."""
    why = "Their tensors do not mean the same, value by value."
    for name, a, b in _differences(first.model, other.model):
        what = f"{first.path} and {other.path} are different models: {flag(name)} is {_shown(a)} in the first, {_shown(b)} in the other."
        raise CheckpointError(what, why, "Give models that were trained from one beginning, or by the same flags.")
    if first.tokenizer.hash != other.tokenizer.hash:
        what = f"{first.path} and {other.path} have different tokenizers: {first.tokenizer.hash[:16]}… and {other.tokenizer.hash[:16]}…."
        raise CheckpointError(what, "The same row of the embedding is another token.", "Give models of one tokenizer.")


def _differences(a: ModelConfig, b: ModelConfig) -> list[tuple[str, Any, Any]]:
    same_heads = a.head_dim == b.head_dim  # however that is said
    names = [field.name for field in dataclasses.fields(a) if field.name not in _INERT | ({"head_size"} if same_heads else set())]
    return [(name, getattr(a, name), getattr(b, name)) for name in names if getattr(a, name) != getattr(b, name)]


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def write_made(output: Path, like: Source, weights: Mapping[str, Lazy], made_by: str, how: Mapping[str, Any], **changes: Any) -> Path:
    """Write a checkpoint of weights to `output`, whole or not at all, with tokenizer, training and step of `like`; every command reads it.

    made_by: the command. how: JSON values, under that name in "extra" of checkpoint.json. changes: other values of About.
    Raises CheckpointError.
    """
    tokenizer, info = SavedTokenizer.of(like.tokenizer), like.info
    about = About(
        model=like.model,
        train=like.train,
        tokenizer=tokenizer,
        dataset=info.dataset if info else None,
        framework={"name": made_by},
        extra={made_by: dict(how)},
    )
    about = dataclasses.replace(about, **changes)
    return write_checkpoint(output.parent, Snapshot(like.step, cast(Any, dict(weights)), {}), about, name=output.name)
