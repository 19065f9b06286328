"""Validation: the mean loss over a fixed set of tokens, and bits per byte, which do not depend on the tokenizer.

val_loss = sum of nats / counted targets          val_bits_per_byte = sum of nats / ln 2 / bytes of the counted targets
"""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from smedjan_common.backend import Backend, State


def evaluate(backend: Backend, state: State, batches: Iterable[tuple[np.ndarray, ...]], token_bytes: np.ndarray) -> dict[str, Any]:
    """`val_loss` and `val_bits_per_byte` (None where it is not defined) of `state`; two batches are in flight.

    batches: (inputs, targets) or (inputs, targets, documents), as eval_batches gives them.
    """
    nats, tokens, num_bytes = 0.0, 0, 0
    waiting = None
    for batch in batches:
        targets = batch[1]
        metrics = backend.eval_step(state, *batch)
        num_bytes += int(token_bytes[targets[targets >= 0]].sum())
        if waiting is not None:
            nats, tokens = _add(backend, waiting, nats, tokens)
        waiting = metrics
    if waiting is not None:
        nats, tokens = _add(backend, waiting, nats, tokens)
    loss = nats / tokens if tokens else math.nan
    bits = nats / math.log(2) / num_bytes if num_bytes else math.nan
    return {"val_loss": _finite(loss), "val_bits_per_byte": _finite(bits)}


def _add(backend: Backend, metrics: Any, nats: float, tokens: int) -> tuple[float, int]:
    values = backend.read(metrics)
    return nats + values["loss_sum"], tokens + int(values["tokens"])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
