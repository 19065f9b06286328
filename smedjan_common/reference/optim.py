"""The optimizers with decoupled weight decay, and clipping by the global norm (Pascanu et al., 2013).

    g <- g * min(1, clip / ||g||)                                  ||g|| over all tensors together; clip 0: off
    p <- p - lr * lr_scale * (direction + decay * p)               t = 1, 2, ... steps; decay: weight_decay, or 0 as the table says

With --ema b the average a of each parameter that moves, a = p at first:

    d = min(b, t / (9 + t));  a <- d a + (1 - d) p                 the new p; t / (9 + t) is (1 + n) / (10 + n) of the n steps done before

adamw (Loshchilov & Hutter, 2019), the same rule as optax.adamw:

    mu <- b1 mu + (1 - b1) g;  nu <- b2 nu + (1 - b2) g^2;  direction = mu / (1 - b1^t) / (sqrt(nu / (1 - b2^t)) + eps)

lion (Chen et al., 2023), as optax.lion:

    direction = sign(b1 mu + (1 - b1) g);  mu <- b2 mu + (1 - b2) g

muon (Jordan, 2024), as optax.contrib.muon with consistent_rms = 0.2; matrices only, the other tensors as adamw does:

    mu <- b mu + (1 - b) g;  m = mu / (1 - b^t), or with Nesterov's look ahead b mu / (1 - b^(t+1)) + (1 - b) g / (1 - b^t)
    X = m / (||m|| + eps), then `muon_steps` times X <- a X + (b A + c A^2) X with A = X X^T      (Newton-Schulz)
    direction = 0.2 sqrt(max(out, in)) X         its root mean square is that of an AdamW step (Liu et al., 2025, Moonlight)
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from smedjan_common.model.parameter import ParamSpec
from smedjan_common.training.config import TrainConfig
from smedjan_common.training.optimizers import EMA, MUON_RMS, NEWTON_SCHULZ, OPTIMIZERS

Tensors = dict[str, np.ndarray]


class OptimizerState(NamedTuple):
    """slot -> parameter -> array, and optimizer steps done."""

    slots: dict[str, Tensors]
    count: int


def init(config: TrainConfig, specs: Mapping[str, ParamSpec], params: Tensors) -> OptimizerState:
    """Zeros in every slot; the averages are the parameters."""
    slots: dict[str, Tensors] = {}
    for name, spec in specs.items():
        for slot in OPTIMIZERS[config.optimizer].slots(spec):
            slots.setdefault(slot, {})[name] = np.zeros(spec.shape)
    if config.ema:
        slots[EMA] = {name: params[name] for name, spec in specs.items() if spec.lr_scale}
    return OptimizerState(slots, 0)


def update(
    config: TrainConfig, specs: Mapping[str, ParamSpec], params: Tensors, grads: Tensors, state: OptimizerState, lr: float
) -> tuple[Tensors, OptimizerState]:
    """One step after clipping: the new parameters and state, float64."""
    count, updated, slots = state.count + 1, dict(params), {slot: dict(tensors) for slot, tensors in state.slots.items()}
    for name, spec in specs.items():
        if spec.lr_scale == 0:
            continue
        kept = {slot: tensors[name] for slot, tensors in state.slots.items() if name in tensors and slot != EMA}
        rule = "adamw" if config.optimizer == "muon" and not spec.matrix else config.optimizer
        direction, kept = DIRECTIONS[rule](config, np.asarray(grads[name], np.float64), kept, count)
        decay = config.weight_decay if spec.decay else 0.0
        updated[name] = params[name] - lr * spec.lr_scale * (direction + decay * params[name])
        for slot, value in kept.items():
            slots[slot][name] = value
        if config.ema:
            decay = min(config.ema, count / (9 + count))
            slots[EMA][name] = decay * slots[EMA][name] + (1 - decay) * updated[name]
    return updated, OptimizerState(slots, count)


def adamw(config: TrainConfig, grad: np.ndarray, kept: Tensors, count: int) -> tuple[np.ndarray, Tensors]:
    """Direction and moments of one tensor."""
    mu = config.beta1 * kept["mu"] + (1 - config.beta1) * grad
    nu = config.beta2 * kept["nu"] + (1 - config.beta2) * grad * grad
    direction = mu / (1 - config.beta1**count) / (np.sqrt(nu / (1 - config.beta2**count)) + config.eps)
    return direction, {"mu": mu, "nu": nu}


def lion(config: TrainConfig, grad: np.ndarray, kept: Tensors, count: int) -> tuple[np.ndarray, Tensors]:
    """Direction and momentum of one tensor."""
    direction = np.sign(config.beta1 * kept["mu"] + (1 - config.beta1) * grad)
    return direction, {"mu": config.beta2 * kept["mu"] + (1 - config.beta2) * grad}


def muon(config: TrainConfig, grad: np.ndarray, kept: Tensors, count: int) -> tuple[np.ndarray, Tensors]:
    """Direction and momentum of one matrix [out, in], or of one per expert [E, out, in]."""
    beta = config.muon_momentum
    mu = beta * kept["mu"] + (1 - beta) * grad
    ahead = mu / (1 - beta**count)
    if config.muon_nesterov:
        ahead = beta * mu / (1 - beta ** (count + 1)) + (1 - beta) * grad / (1 - beta**count)
    matrices = ahead.reshape(-1, *ahead.shape[-2:])
    turned = np.stack([orthogonalized(matrix, config.muon_steps, config.eps) for matrix in matrices])
    return MUON_RMS * np.sqrt(max(ahead.shape[-2:])) * turned.reshape(ahead.shape), {"mu": mu}


def orthogonalized(matrix: np.ndarray, steps: int, eps: float) -> np.ndarray:
    """About U V^T of the matrix U S V^T: its singular values all near 1."""
    a, b, c = NEWTON_SCHULZ
    x = matrix / (np.linalg.norm(matrix) + eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


DIRECTIONS = {"adamw": adamw, "muon": muon, "lion": lion}


def global_norm(grads: Tensors) -> float:
    """Euclidean norm of all tensors together."""
    return float(np.sqrt(sum(np.square(np.asarray(grad, np.float64)).sum() for grad in grads.values())))


def clip_by_global_norm(grads: Tensors, limit: float) -> tuple[Tensors, float]:
    """Gradients scaled so that their norm is at most `limit` (0: as they are), and the norm before that."""
    norm = global_norm(grads)
    scale = limit / norm if 0 < limit < norm else 1.0
    return {name: np.asarray(grad, np.float64) * scale for name, grad in grads.items()}, norm
