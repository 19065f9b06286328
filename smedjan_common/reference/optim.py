"""AdamW with decoupled weight decay (Loshchilov & Hutter, 2019) and clipping by the global norm (Pascanu et al., 2013).

    g <- g * min(1, clip / ||g||)                                  ||g|| over all tensors together; clip 0: off
    mu <- b1 mu + (1 - b1) g;  nu <- b2 nu + (1 - b2) g^2
    p <- p - lr ( mu / (1 - b1^t) / (sqrt(nu / (1 - b2^t)) + eps) + decay * p )        t = 1, 2, ...

`decay` is TrainConfig.weight_decay where the parameter table says so, else 0. The same rule as optax.adamw.
"""

from typing import NamedTuple

import numpy as np

from smedjan_common.config import TrainConfig

Tensors = dict[str, np.ndarray]


class AdamWState(NamedTuple):
    """First and second moments by parameter name, and optimizer steps done."""

    mu: Tensors
    nu: Tensors
    count: int


def adamw_init(params: Tensors) -> AdamWState:
    """Zero moments."""
    zeros = {name: np.zeros(value.shape) for name, value in params.items()}
    return AdamWState(zeros, dict(zeros), 0)


def adamw_update(
    config: TrainConfig, decays: dict[str, bool], params: Tensors, grads: Tensors, state: AdamWState, lr: float
) -> tuple[Tensors, AdamWState]:
    """One step after clipping: the new parameters and state, float64."""
    count = state.count + 1
    grads = {name: np.asarray(grad, np.float64) for name, grad in grads.items()}
    mu = {name: config.beta1 * state.mu[name] + (1 - config.beta1) * grad for name, grad in grads.items()}
    nu = {name: config.beta2 * state.nu[name] + (1 - config.beta2) * grad * grad for name, grad in grads.items()}
    updated = {}
    for name, value in params.items():
        direction = mu[name] / (1 - config.beta1**count) / (np.sqrt(nu[name] / (1 - config.beta2**count)) + config.eps)
        updated[name] = value - lr * (direction + config.weight_decay * decays[name] * value)
    return updated, AdamWState(mu, nu, count)


def global_norm(grads: Tensors) -> float:
    """Euclidean norm of all tensors together."""
    return float(np.sqrt(sum(np.square(np.asarray(grad, np.float64)).sum() for grad in grads.values())))


def clip_by_global_norm(grads: Tensors, limit: float) -> tuple[Tensors, float]:
    """Gradients scaled so that their norm is at most `limit` (0: as they are), and the norm before that."""
    norm = global_norm(grads)
    scale = limit / norm if 0 < limit < norm else 1.0
    return {name: np.asarray(grad, np.float64) * scale for name, grad in grads.items()}, norm
