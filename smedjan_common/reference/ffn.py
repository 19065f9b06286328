"""SwiGLU (Shazeer, 2020): y = (silu(x Wgate^T) * (x Wup^T)) Wdown^T, silu(z) = z / (1 + e^-z)."""

import numpy as np

from smedjan_common.model.config import ModelConfig
from smedjan_common.reference.activations import silu


def forward(config: ModelConfig, params: dict[str, np.ndarray], x_BxTxD: np.ndarray, carried: dict) -> np.ndarray:
    """[B, T, D] -> [B, T, D], every token by itself."""
    gate_BxTxF = x_BxTxD @ params["gate_proj.weight"].T
    up_BxTxF = x_BxTxD @ params["up_proj.weight"].T
    return (silu(gate_BxTxF) * up_BxTxF) @ params["down_proj.weight"].T
