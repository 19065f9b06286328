"""Opening a trained model to infer: the newest weights under a path, the tokenizer they were trained with, and how to compute with them."""

import dataclasses
import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smedjan_common.checkpoint import CheckpointInfo, newest
from smedjan_common.checkpoint.pulled import checkpoint_here
from smedjan_common.errors import CheckpointError, notice
from smedjan_common.files.names import MANIFEST, TOKENIZER
from smedjan_common.model.config import ModelConfig
from smedjan_common.model.quantization import FORMAT
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.training.config import TrainConfig

_FOREIGN, _QUANTIZED = "convert.hf_import", "convert.quantized"  # by their names: they are built on what is here


@dataclass(frozen=True)
class Foreign:
    """A model in a directory of Hugging Face's form. `read` makes its weights, float32 or quantised; nothing is written anywhere."""

    path: Path
    model: ModelConfig
    weights: Mapping[str, Any]
    read: Callable[[], dict[str, np.ndarray]]
    train: None = None
    format: str = "hf"


def open_model(path: str | os.PathLike) -> tuple[CheckpointInfo | Foreign, Tokenizer]:
    """The checkpoint with the newest weights under `path` (a run folder, step-*/ or final/), or the model of a Hugging Face directory, and
    its tokenizer. No weight is read; a checkpoint at an address is brought to the cache.

    Raises CheckpointError where there is none, or where the tokenizer is missing or another one; ConfigError for a foreign model that
    cannot be expressed.
    """
    path = checkpoint_here(path)
    if _is_foreign(path):
        return _open_foreign(path)
    info = newest(path)
    if not (info.path / TOKENIZER).is_file():
        raise CheckpointError(f"{info.path} has no {TOKENIZER}.", "Text cannot become tokens without it.", "Copy the tokenizer there.")
    tokenizer = Tokenizer.load(info.path)
    if info.tokenizer_hash and tokenizer.hash != info.tokenizer_hash:
        raise CheckpointError(
            f"The tokenizer.json of {info.path} is not the one it was trained with.", "Its hash differs.", "Restore it from a good copy."
        )
    return info, tokenizer


def decoding_config(info: CheckpointInfo | Foreign, dtype: str) -> TrainConfig:
    """A training configuration for a backend that only infers. Raises ConfigError for an unknown dtype."""
    base = info.train or TrainConfig(steps=1, batch_size=1, seq_len=1, lr=1.0)
    train = dataclasses.replace(base.of_whole_model(), dtype=dtype)
    train.validate()
    return train


def _is_foreign(path: Path) -> bool:
    """A folder of a run has no weights of its own, and a checkpoint has its manifest."""
    alike = (path / "config.json").is_file() and not (path / MANIFEST).exists() and any(path.glob("*.safetensors"))
    return alike and importlib.import_module(_FOREIGN).detect(path)


def _open_foreign(path: Path) -> tuple[Foreign, Tokenizer]:
    quantized = importlib.import_module(_QUANTIZED)
    small = quantized.detect(path)
    found = quantized.read(path) if small else importlib.import_module(_FOREIGN).read(path)
    if found.tokenizer is None:
        raise CheckpointError(f"{path} has no {TOKENIZER}.", "Text cannot become tokens without it.", "Copy the tokenizer there.")
    for sentence in found.notes:
        notice(sentence)
    weights = quantized.params(found) if small else found.tensors
    read = lambda: {name: np.asarray(tensor) for name, tensor in weights.items()}  # noqa: E731
    return Foreign(path, found.config, weights, read, format=FORMAT if small else "hf"), found.tokenizer
