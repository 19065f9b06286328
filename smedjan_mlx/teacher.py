"""The teacher of a run on its device: weights that stay as they are, in the dtype that they are used in.

A step reads it part by part: its forward pass has no gradient, so that no activation of it is kept.
"""

from typing import Any

import mlx.core as mx

from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.model.params import head_name
from smedjan_common.training.distillation import Mixed
from smedjan_mlx.distillation import Taught
from smedjan_mlx.model import Model


class Teacher:
    """config: its model. params: its arrays on the device, which a step takes as an argument. mixed: what a step makes of it."""

    def __init__(self, config: ModelConfig, train: TrainConfig, params: dict[str, Any], known: int):
        self.config, self.params, self._train = config, params, train
        self.mixed = Mixed(known, train.distill_temperature, train.distill_alpha)

    def read(self, params: dict[str, Any], inputs: mx.array, documents: mx.array | None) -> Taught:
        """What it gives to the tokens [B, T] of a batch, where a step is traced."""
        train = self._train
        options = "none", train.chunk_size, train.deterministic, _unless_plain(train.kernels)
        model = Model(self.config, params, train.dtype, _unless_plain(train.attention), *options)
        return Taught(model.hidden(inputs, documents), params[head_name(self.config)])


def _unless_plain(asked: str) -> str:
    """Attention and kernels that the model of the run can have, and its teacher perhaps not, are left to the device."""
    return "plain" if asked == "plain" else "auto"
