"""A training step of the JAX backend, compiled before there is any array of it, so that compiling and running can be told apart."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_jax.backend import JaxBackend


class JaxStep:
    """Random tokens; a step is forward, backward, clipping and the optimizer. `bytes`: what XLA lays out beside the state."""

    def __init__(self, model: ModelConfig, train: TrainConfig):
        self.backend = JaxBackend(model, train)
        tokens = np.random.default_rng(0).integers(0, model.vocab_size, (train.batch_size, train.seq_len + 1)).astype(np.int32)
        self._batch: Any = (tokens[:, :-1].copy(), tokens[:, 1:].copy())
        step = jax.jit(lambda state, inputs, targets: self.backend.train_step(state, inputs, targets, train.lr), donate_argnums=0)
        self._compiled: Any = step.lower(self.backend.shapes, *self._batch).compile()
        self.bytes: int = self._compiled.memory_analysis().temp_size_in_bytes
        self._state: Any = None
        self._metrics: Any = None

    def start(self, params: dict[str, np.ndarray] | None = None) -> None:
        """Put state and tokens on the device; without `params` random weights, made there."""
        self._batch = jax.device_put(self._batch)
        self._state = self.backend.init(params) if params else self._random_state()

    def __call__(self) -> None:
        """One step; returns at once."""
        self._state, self._metrics = self._compiled(self._state, *self._batch)

    def wait(self) -> None:
        """Until the device is done."""
        jax.block_until_ready((self._state, self._metrics))

    def _random_state(self) -> Any:
        shapes = self.backend.shapes
        state = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype, device=shape.sharding), shapes)
        for number, (name, shape) in enumerate(shapes["params"].items()):
            state["params"][name] = _draw(number, shape)
        return state


def _draw(number: int, shape: jax.ShapeDtypeStruct) -> jax.Array:
    """Normal numbers of standard deviation 0.02, ones where a tensor has one dimension."""
    if len(shape.shape) < 2:
        return jnp.ones(shape.shape, shape.dtype, device=shape.sharding)
    return jax.device_put(0.02 * jax.random.normal(jax.random.key(number), shape.shape, shape.dtype), shape.sharding)
