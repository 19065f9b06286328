"""Cross-entropy: -log softmax(logits)[target], over the tokens whose target is not IGNORED; in nats. And the z-loss beside it.

The softmax runs over all rows of the output head, those that pad the vocabulary included: no target ever names them, so
training pushes them down by itself.
"""

import numpy as np

from smedjan_common.backend import IGNORED


def cross_entropy(logits_BxTxV: np.ndarray, targets_BxT: np.ndarray) -> tuple[float, int]:
    """Sum over the counted tokens, and how many they are."""
    return float(token_losses(logits_BxTxV, targets_BxT).sum()), int((targets_BxT != IGNORED).sum())


def weighted_cross_entropy(logits_BxTxV: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> float:
    """Sum over tokens and their targets of -w log softmax(logits)[target], where a target counts. targets, weights: [B, T], or [B, T, K]:
    K targets of each token. Weights have any sign: nothing is divided by their sum."""
    losses = token_losses(logits_BxTxV, targets.reshape(*logits_BxTxV.shape[:2], -1))
    return float((weights.reshape(losses.shape) * losses).sum())


def token_losses(logits_BxTxV: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[target] of each target [B, T] or [B, T, K], 0 where it does not count."""
    log_probability = logits_BxTxV - logsumexp(logits_BxTxV)[..., None]
    places = targets if targets.ndim == 3 else targets[..., None]
    picked = np.take_along_axis(log_probability, np.where(places != IGNORED, places, 0), axis=-1)
    return np.where(targets != IGNORED, -picked.reshape(targets.shape), 0.0)


def mean_cross_entropy(logits_BxTxV: np.ndarray, targets_BxT: np.ndarray) -> float:
    """Mean over the counted tokens; 0 where none counts."""
    total, count = cross_entropy(logits_BxTxV, targets_BxT)
    return total / max(count, 1)


def mean_z_loss(logits_BxTxV: np.ndarray, targets_BxT: np.ndarray) -> float:
    """Mean of logsumexp(logits)^2 over the counted tokens: how far the softmax is from being normalised (PaLM, 2022)."""
    counted = targets_BxT != IGNORED
    return float((np.square(logsumexp(logits_BxTxV)) * counted).sum() / max(int(counted.sum()), 1))


def mean_kl(taught_BxTxV: np.ndarray, logits_BxTxV: np.ndarray, targets_BxT: np.ndarray, known: int, temperature: float) -> float:
    """Mean over the counted tokens of KL(p || q) = sum of p log(p / q), nats; p, q: softmax of the first `known` logits of a teacher and
    of a student over the temperature (Hinton et al., 2015)."""
    logp, logq = (scaled - logsumexp(scaled)[..., None] for scaled in (z[..., :known] / temperature for z in (taught_BxTxV, logits_BxTxV)))
    counted = targets_BxT != IGNORED
    return float(((np.exp(logp) * (logp - logq)).sum(axis=-1) * counted).sum() / max(int(counted.sum()), 1))


def logsumexp(values: np.ndarray) -> np.ndarray:
    """log of the sum of exponentials over the last axis."""
    largest = values.max(axis=-1)
    return largest + np.log(np.exp(values - largest[..., None]).sum(axis=-1))
