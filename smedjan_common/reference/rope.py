"""Rotary position embedding (Su et al., 2021), half-split layout, with the frequencies of smedjan_common.model.rope in float64.

a = position * theta_i        y_i       = m (x_i cos a - x_{i+K/2} sin a)
                              y_{i+K/2} = m (x_{i+K/2} cos a + x_i sin a)        i < K/2
"""

import numpy as np

from smedjan_common.model.config import ModelConfig
from smedjan_common.model.rope import attention_factor, frequencies


def rotate(x_BxTxHxK: np.ndarray, config: ModelConfig, start: int = 0, dim: int | None = None) -> np.ndarray:
    """Turn all K features of every head by their position, or the first `dim` of them; the first token stands at `start`."""
    if dim is not None and dim < x_BxTxHxK.shape[-1]:
        return np.concatenate([rotate(x_BxTxHxK[..., :dim], config, start), x_BxTxHxK[..., dim:]], axis=-1)
    position_T = np.arange(start, start + x_BxTxHxK.shape[1], dtype=np.float64)
    angle_Tx1xk = (position_T[:, None] * frequencies(config, x_BxTxHxK.shape[-1]))[:, None, :]
    m = attention_factor(config)
    cos, sin = m * np.cos(angle_Tx1xk), m * np.sin(angle_Tx1xk)
    first, second = np.split(x_BxTxHxK, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
