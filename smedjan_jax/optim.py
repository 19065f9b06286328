"""Optimizers over flat dicts of arrays: optax transforms with every constant given, plus clipping by the global norm.

    adamw: m, v moments with bias correction; p <- p - lr (m^ / (sqrt(v^) + eps) + decay p)     (Loshchilov & Hutter, 2019)

The slots (mu, nu) and the number of steps are what a checkpoint keeps.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.params import decay_mask

Params = dict[str, jax.Array]
SLOTS = {"adamw": ("mu", "nu")}


def init(train: TrainConfig, params: Params) -> dict[str, Params]:
    """Slots of the optimizer, zeros like the parameters."""
    return {slot: {name: jnp.zeros_like(value) for name, value in params.items()} for slot in SLOTS[train.optimizer]}


def global_norm(grads: Params) -> jax.Array:
    """Euclidean norm over all tensors, float32 scalar."""
    squares = [jnp.sum(jnp.square(g.astype(jnp.float32))) for g in grads.values()]
    return jnp.sqrt(jnp.sum(jnp.stack(squares)))


def clip(grads: Params, norm: jax.Array, limit: float) -> Params:
    """Scale the gradients so that their global norm is at most `limit`; 0 switches it off."""
    if limit == 0:
        return grads
    scale = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-30))
    return {name: g * scale for name, g in grads.items()}


def update(
    model: ModelConfig, train: TrainConfig, params: Params, grads: Params, slots: dict[str, Params], step: jax.Array, lr: jax.Array
) -> tuple[Params, dict[str, Params]]:
    """One step of the optimizer. `step` counts the steps done before, int32; returns new parameters and slots."""
    return _UPDATES[train.optimizer](model, train, params, grads, slots, step, lr)


def _adamw(
    model: ModelConfig, train: TrainConfig, params: Params, grads: Params, slots: dict[str, Params], step: jax.Array, lr: jax.Array
) -> Any:
    adam = optax.scale_by_adam(b1=train.beta1, b2=train.beta2, eps=train.eps, eps_root=0.0)
    moments = optax.ScaleByAdamState(count=step, mu=slots["mu"], nu=slots["nu"])
    direction, moments = cast(tuple[Params, optax.ScaleByAdamState], adam.update(grads, moments))
    decay = {name: train.weight_decay if on else 0.0 for name, on in decay_mask(model).items()}
    params = {name: p - lr * (direction[name] + decay[name] * p) for name, p in params.items()}
    return params, {"mu": cast(Params, moments.mu), "nu": cast(Params, moments.nu)}


_UPDATES = {"adamw": _adamw}
