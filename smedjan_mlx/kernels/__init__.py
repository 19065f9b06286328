"""What --kernels comes to with MLX: there are only the plain forms. The twin of smedjan_jax/kernels, which has kernels."""

from smedjan_common.config import ModelConfig
from smedjan_common.errors import ConfigError
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.mixers.shared import Chunked


def chosen(mixer: str, implementation: str, model: ModelConfig, dtype: str) -> str:
    """What `implementation` of --kernels comes to for a mixer: "plain". Raises ConfigError for "pallas"."""
    if implementation == "pallas":
        raise ConfigError(
            "--kernels pallas cannot run with MLX.", "Pallas is a part of JAX.", "Take --kernels auto or plain, or --backend jax."
        )
    return "plain"


def summary(implementation: str, model: ModelConfig, dtype: str) -> str:
    """What the console says: "plain", or nothing for a model without mixers that have kernels. Raises ConfigError."""
    names = [name for name in dict.fromkeys(model.mixer) if MIXERS[name].training is Chunked]
    return next((chosen(name, implementation, model, dtype) for name in names), "")
