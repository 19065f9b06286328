"""RMSNorm (Zhang & Sennrich, 2019): y = x / sqrt(mean(x^2) + eps) * weight, over the last axis."""

import numpy as np


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x [..., D], weight [D] -> [..., D]."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight
