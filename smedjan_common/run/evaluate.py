"""Validation: the mean loss over a fixed set of tokens, and bits per byte, which do not depend on the tokenizer.

val_loss = sum of nats / counted targets          val_bits_per_byte = sum of nats / ln 2 / bytes of the counted targets

Of objectives whose units are not tokens, val_loss is their loss over the units, there are no bits per byte, and each of their metrics is
there too: val_rewards/accuracies, say.
"""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from smedjan_common.backend import Backend, State


def evaluate(backend: Backend, state: State, batches: Iterable[tuple[np.ndarray, ...]], token_bytes: np.ndarray) -> dict[str, Any]:
    """`val_loss` and `val_bits_per_byte` (None where it is not defined) of `state`; two batches are in flight.

    batches: (inputs, targets) or (inputs, targets, documents), as eval_batches gives them; of pairs with a reference.
    """
    sums: Counter[str] = Counter()
    num_bytes, waiting = 0, None
    for batch in batches:
        targets = batch[1]
        metrics = backend.eval_step(state, *batch)
        num_bytes += int(token_bytes[targets[targets >= 0]].sum())
        if waiting is not None:
            sums.update(backend.read(waiting))
        waiting = metrics
    if waiting is not None:
        sums.update(backend.read(waiting))
    nats, tokens, of_objective = sums.pop("loss_sum", 0.0), sums.pop("tokens", 0), "units" in sums
    count = sums.pop("units") if of_objective else tokens
    loss = nats / count if count else math.nan
    bits = nats / math.log(2) / num_bytes if num_bytes and not of_objective else math.nan
    others = {f"val_{name}": _finite(value / count) if count else None for name, value in sums.items()}
    return {"val_loss": _finite(loss), "val_bits_per_byte": _finite(bits), **others}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
