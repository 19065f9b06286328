"""Opening a trained model to infer: the newest weights under a path, the tokenizer they were trained with, and how to compute with them."""

import dataclasses
import os

from smedjan_common.checkpoint import CheckpointInfo, newest
from smedjan_common.errors import CheckpointError
from smedjan_common.files.names import TOKENIZER
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.training.config import TrainConfig


def open_model(path: str | os.PathLike) -> tuple[CheckpointInfo, Tokenizer]:
    """The checkpoint with the newest weights under `path` (a run folder, step-*/ or final/), and its tokenizer. No weight is read.

    Raises CheckpointError where there is none, or where the tokenizer is missing or another one.
    """
    info = newest(path)
    if not (info.path / TOKENIZER).is_file():
        raise CheckpointError(f"{info.path} has no {TOKENIZER}.", "Text cannot become tokens without it.", "Copy the tokenizer there.")
    tokenizer = Tokenizer.load(info.path)
    if info.tokenizer_hash and tokenizer.hash != info.tokenizer_hash:
        raise CheckpointError(
            f"The tokenizer.json of {info.path} is not the one it was trained with.", "Its hash differs.", "Restore it from a good copy."
        )
    return info, tokenizer


def decoding_config(info: CheckpointInfo, dtype: str) -> TrainConfig:
    """A training configuration for a backend that only infers. Raises ConfigError for an unknown dtype."""
    base = info.train or TrainConfig(steps=1, batch_size=1, seq_len=1, lr=1.0)
    train = dataclasses.replace(base, dtype=dtype)
    train.validate()
    return train
