"""Estimated memory to infer, in bytes: weights and the decode state."""

from smedjan_common.model.config import ModelConfig
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.params import count_params
from smedjan_common.training.precision import BYTES, compute_dtype


def inference_bytes(config: ModelConfig, batch: int, max_len: int, dtype: str) -> int:
    """Weights in the compute dtype of `dtype` and the decode state of all layers."""
    width = BYTES[compute_dtype(dtype)]
    return count_params(config) * width + state_bytes(config, batch, max_len, dtype)


def state_bytes(config: ModelConfig, batch: int, max_len: int, dtype: str) -> int:
    """Decode state of all layers."""
    total = 0
    for layer in range(config.layers):
        for array in MIXERS[config.mixer_of(layer)].state(config, batch, max_len):
            size = 1
            for extent in array.shape:
                size *= extent
            total += size * BYTES[compute_dtype(dtype) if array.dtype == "compute" else array.dtype]
    return total
