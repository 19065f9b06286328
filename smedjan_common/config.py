"""The two configurations that both backends read and nothing else: what a model is, and how it is trained."""

from smedjan_common.model.config import ModelConfig
from smedjan_common.training.config import TrainConfig

__all__ = ["ModelConfig", "TrainConfig"]
