"""Optimizers over flat dicts of arrays, every constant given, plus clipping by the global norm.

    adamw: m, v moments with bias correction; p <- p - lr (m^ / (sqrt(v^) + eps) + decay p)     (Loshchilov & Hutter, 2019)

The slots (mu, nu) and the number of steps are what a checkpoint keeps. Written out here, not mlx.optimizers: the decay
differs by parameter, and the numbers must be optax's.
"""

from typing import Any

import mlx.core as mx

from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.params import decay_mask

Params = dict[str, mx.array]
SLOTS = {"adamw": ("mu", "nu")}


def init(train: TrainConfig, params: Params) -> dict[str, Params]:
    """Slots of the optimizer, zeros like the parameters."""
    return {slot: {name: mx.zeros_like(value) for name, value in params.items()} for slot in SLOTS[train.optimizer]}


def global_norm(grads: Params) -> mx.array:
    """Euclidean norm over all tensors, float32 scalar."""
    # rows first: MLX sums a whole array on a CPU value after value, which is off by 5e-4 at a million values
    squares = [mx.sum(mx.sum(mx.square(g.astype(mx.float32)), axis=-1)) for g in grads.values()]
    return mx.sqrt(mx.sum(mx.stack(squares)))


def clip(grads: Params, norm: mx.array, limit: float) -> Params:
    """Scale the gradients so that their global norm is at most `limit`; 0 switches it off."""
    if limit == 0:
        return grads
    scale = mx.minimum(1.0, limit / mx.maximum(norm, 1e-30))
    return {name: g * scale for name, g in grads.items()}


def update(
    model: ModelConfig, train: TrainConfig, params: Params, grads: Params, slots: dict[str, Params], step: mx.array, lr: mx.array
) -> tuple[Params, dict[str, Params]]:
    """One step of the optimizer. `step` counts the steps done before, int32; returns new parameters and slots."""
    return _UPDATES[train.optimizer](model, train, params, grads, slots, step, lr)


def _adamw(
    model: ModelConfig, train: TrainConfig, params: Params, grads: Params, slots: dict[str, Params], step: mx.array, lr: mx.array
) -> Any:
    b1, b2, count = train.beta1, train.beta2, (step + 1).astype(mx.float32)
    mu = {name: (1 - b1) * g + b1 * slots["mu"][name] for name, g in grads.items()}
    nu = {name: (1 - b2) * mx.square(g) + b2 * slots["nu"][name] for name, g in grads.items()}
    mu_scale, nu_scale = 1 - mx.power(b1, count), 1 - mx.power(b2, count)
    decay = {name: train.weight_decay if on else 0.0 for name, on in decay_mask(model).items()}
    params = {
        name: p - lr * ((mu[name] / mu_scale) / (mx.sqrt(nu[name] / nu_scale) + train.eps) + decay[name] * p) for name, p in params.items()
    }
    return params, {"mu": mu, "nu": nu}


_UPDATES = {"adamw": _adamw}
