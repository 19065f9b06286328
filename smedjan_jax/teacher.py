"""The teacher of a run on its devices: weights that stay as they are, in the dtype that they are used in, spread as the model's.

A step reads it part by part: its forward pass has no gradient, so that no activation of it is kept.
"""

from typing import Any

import jax
import numpy as np

from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.model.params import head_name, parameter_table
from smedjan_common.training.distillation import Mixed
from smedjan_common.training.precision import compute_dtype
from smedjan_jax import sharding
from smedjan_jax.distillation import Taught
from smedjan_jax.model import Model
from smedjan_jax.weights import compute_weights


class Teacher:
    """config: its model. params: its arrays on the device, which a step takes as an argument. mixed: what a step makes of it."""

    def __init__(self, config: ModelConfig, train: TrainConfig, params: dict[str, Any], known: int):
        self.config, self.params, self._train = config, params, train
        self.mixed = Mixed(known, train.distill_temperature, train.distill_alpha)

    def read(self, params: dict[str, Any], inputs: jax.Array, documents: jax.Array | None) -> Taught:
        """What it gives to the tokens [B, T] of a batch, where a step is traced."""
        train = self._train
        options = "none", train.chunk_size, train.deterministic, _unless_plain(train.kernels)
        model = Model(self.config, params, compute_dtype(train.dtype), _unless_plain(train.attention), *options)
        return Taught(model.hidden(inputs, documents), params[head_name(self.config)])


def placed(config: ModelConfig, train: TrainConfig, params: dict[str, Any], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """The weights on the devices of a mesh, in the dtype that they are used in: bfloat16 in float8 runs."""
    cast, dtype = compute_weights(config), jax.numpy.dtype(compute_dtype(train.dtype))
    host = {name: np.asarray(value, dtype if name in cast else np.float32) for name, value in params.items()}
    return sharding.place(host, sharding.param_shardings(parameter_table(config), mesh))


def _unless_plain(asked: str) -> str:
    """Attention and kernels that the model of the run can have, and its teacher perhaps not, are left to the device."""
    return "plain" if asked == "plain" else "auto"
