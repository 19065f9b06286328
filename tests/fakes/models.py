"""Checkpoints for tests that nothing was trained for: initial values, written as a run would."""

import functools
from pathlib import Path
from typing import Any

from smedjan_common.backend import Snapshot
from smedjan_common.checkpoint import About, SavedTokenizer, write_checkpoint
from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.model.params import initial_params
from smedjan_common.tokenizer import Tokenizer
from tests.fakes.runs import TEXT

TRAIN = TrainConfig(steps=10, batch_size=2, seq_len=16, lr=1e-3)


@functools.cache
def tokenizer(size: int = 300) -> Tokenizer:
    """A small one, always the same."""
    return Tokenizer.train_from_texts([TEXT], size)


def model(**changes: Any) -> ModelConfig:
    """A tiny one."""
    return ModelConfig.build(**{"vocab_size": 300, "dim": 16, "layers": 1, "heads": 2, "ffn_dim": 24, "context_length": 16, **changes})


def save(place: Path, config: ModelConfig, params: Any, step: int = 10, words: Tokenizer | None = None, train: TrainConfig = TRAIN) -> Path:
    """A checkpoint of weights at `place`."""
    about = About(model=config, train=train, tokenizer=SavedTokenizer.of(words or tokenizer()), framework={"name": "test"})
    return write_checkpoint(place.parent, Snapshot(step, params, {}), about, name=place.name)


def save_initial(place: Path, seed: int, config: ModelConfig | None = None, **more: Any) -> dict[str, Any]:
    """The same of initial values, which are returned."""
    config = config or model()
    params = initial_params(config, seed)
    save(place, config, params, **more)
    return params
