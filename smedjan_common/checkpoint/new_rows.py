"""Weights for tokens that a tokenizer has gained: new rows of the embedding and of the output head.

A new row is the mean of the rows that training has seen, in float64. A row that training has not seen, or one of small random numbers,
is a token that the softmax has pushed far down, or one that it thinks likely everywhere; the mean is neither, and is a pure function, so
every backend begins alike. Several new rows are equal at first, and part by their gradients.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from smedjan_common.model.config import ModelConfig
from smedjan_common.model.params import head_name


def with_new_rows(params: Mapping[str, Any], model: ModelConfig, seen: int, tokens: int) -> dict[str, Any]:
    """The parameters of `model`: of its tokens the first `seen` had been trained, and the rows up to `tokens` are new.

    params: float arrays by name, of the smaller vocabulary or of one that has room. Rows that pad the larger one are the mean too.
    """
    tables = dict.fromkeys(("embed.weight", head_name(model)))
    return {**params, **{name: grown_rows(params[name], model, seen, tokens) for name in tables}}


def grown_rows(table: Any, model: ModelConfig, seen: int, tokens: int) -> np.ndarray:
    """The same of the embedding alone, or of the head."""
    old = np.asarray(table)
    mean = old[:seen].mean(axis=0, dtype=np.float64).astype(old.dtype)
    rows = np.broadcast_to(mean, (model.padded_vocab_size, old.shape[1])).copy()
    rows[: len(old)] = old
    rows[seen:tokens] = mean
    return rows
