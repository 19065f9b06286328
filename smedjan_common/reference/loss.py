"""Cross-entropy: -log softmax(logits)[target], over the tokens whose target is not IGNORED; in nats.

The softmax runs over all rows of the output head, those that pad the vocabulary included: no target ever names them, so
training pushes them down by itself.
"""

import numpy as np

IGNORED = -1


def cross_entropy(logits_BxTxV: np.ndarray, targets_BxT: np.ndarray) -> tuple[float, int]:
    """Sum over the counted tokens, and how many they are."""
    shifted = logits_BxTxV - logits_BxTxV.max(axis=-1, keepdims=True)
    log_probability = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    counted = targets_BxT != IGNORED
    picked_BxT = np.take_along_axis(log_probability, np.where(counted, targets_BxT, 0)[..., None], axis=-1)[..., 0]
    return float(-(picked_BxT * counted).sum()), int(counted.sum())


def mean_cross_entropy(logits_BxTxV: np.ndarray, targets_BxT: np.ndarray) -> float:
    """Mean over the counted tokens; 0 where none counts."""
    total, count = cross_entropy(logits_BxTxV, targets_BxT)
    return total / max(count, 1)
