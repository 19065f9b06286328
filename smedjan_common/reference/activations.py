"""Functions of single numbers: sigmoid(z) = 1 / (1 + e^-z) and silu(z) = z sigmoid(z)."""

import numpy as np


def sigmoid(z: np.ndarray) -> np.ndarray:
    """Between 0 and 1, of z's shape."""
    return 1 / (1 + np.exp(-z))


def silu(z: np.ndarray) -> np.ndarray:
    """Of z's shape."""
    return z * sigmoid(z)
