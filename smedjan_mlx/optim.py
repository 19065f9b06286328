"""Optimizers over flat dicts of arrays (equations: smedjan_common.reference.optim), plus clipping by the global norm.

    p <- p - lr lr_scale (direction + decay p)

A row of smedjan_common.training.optimizers has its directions here, every constant given. Written out, not mlx.optimizers: how a tensor
is treated differs by parameter, and the numbers must be optax's. Matrices of equal shape go through Newton-Schulz as one
batch, in the compute dtype. The slots and the number of steps are what a checkpoint keeps.
"""

import mlx.core as mx

from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.model.adapters import trained_table
from smedjan_common.model.parameter import ParamSpec
from smedjan_common.training.optimizers import EMA, MUON_RMS, NEWTON_SCHULZ, slot_names

Params = dict[str, mx.array]
Slots = dict[str, Params]
_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}


def init(model: ModelConfig, train: TrainConfig, params: Params) -> Slots:
    """Slots of the optimizer, zeros like the parameters that have them; averages are copies of them."""
    make, slots = {EMA: mx.array}, slot_names(model, train.optimizer, train.ema, train.adapters)
    return {slot: {name: make.get(slot, mx.zeros_like)(params[name]) for name in names} for slot, names in slots.items()}


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
    model: ModelConfig, train: TrainConfig, params: Params, grads: Params, slots: Slots, step: mx.array, lr: mx.array
) -> tuple[Params, Slots]:
    """One step of the optimizer. `step` counts the steps done before, int32; returns new parameters and slots."""
    specs = {name: spec for name, spec in trained_table(model, train.adapters).items() if spec.lr_scale}
    grads = {name: grads[name] for name in specs}
    directions, moments = _DIRECTIONS[train.optimizer](train, specs, grads, slots, step)
    moved = {}
    for name, spec in specs.items():
        rate = lr if spec.lr_scale == 1 else lr * spec.lr_scale
        decay = train.weight_decay if spec.decay else 0.0
        moved[name] = params[name] - rate * (directions[name] + decay * params[name])
    return {**params, **moved}, moments | _averages(train, slots, moved, step)


def _averages(train: TrainConfig, slots: Slots, moved: Params, step: mx.array) -> Slots:
    """The moving averages of the parameters that moved; none without --ema."""
    if not train.ema:
        return {}
    done = step.astype(mx.float32)
    decay = mx.minimum(train.ema, (1 + done) / (10 + done))
    return {EMA: {name: decay * slots[EMA][name] + (1 - decay) * value for name, value in moved.items()}}


def _adamw(train: TrainConfig, specs: dict[str, ParamSpec], grads: Params, slots: Slots, step: mx.array) -> tuple[Params, Slots]:
    b1, b2, count = train.beta1, train.beta2, (step + 1).astype(mx.float32)
    mu = {name: (1 - b1) * g + b1 * slots["mu"][name] for name, g in grads.items()}
    nu = {name: (1 - b2) * mx.square(g) + b2 * slots["nu"][name] for name, g in grads.items()}
    mu_scale, nu_scale = 1 - mx.power(b1, count), 1 - mx.power(b2, count)
    directions = {name: (mu[name] / mu_scale) / (mx.sqrt(nu[name] / nu_scale) + train.eps) for name in grads}
    return directions, {"mu": mu, "nu": nu}


def _lion(train: TrainConfig, specs: dict[str, ParamSpec], grads: Params, slots: Slots, step: mx.array) -> tuple[Params, Slots]:
    b1, b2 = train.beta1, train.beta2
    directions = {name: mx.sign((1 - b1) * g + b1 * slots["mu"][name]) for name, g in grads.items()}
    return directions, {"mu": {name: (1 - b2) * g + b2 * slots["mu"][name] for name, g in grads.items()}}


def _muon(train: TrainConfig, specs: dict[str, ParamSpec], grads: Params, slots: Slots, step: mx.array) -> tuple[Params, Slots]:
    others = {name: grad for name, grad in grads.items() if not specs[name].matrix}
    directions, moments = _adamw(train, specs, others, {**slots, "mu": {name: slots["mu"][name] for name in others}}, step)
    beta, count, ahead = train.muon_momentum, (step + 1).astype(mx.float32), {}
    now, later = 1 - mx.power(beta, count), 1 - mx.power(beta, count + 1)
    for name in [name for name in grads if name not in others]:
        moments["mu"][name] = mu = (1 - beta) * grads[name] + beta * slots["mu"][name]
        ahead[name] = beta * (mu / later) + (1 - beta) * (grads[name] / now) if train.muon_nesterov else mu / now
    return {**directions, **_orthogonal(train, ahead)}, moments


def _orthogonal(train: TrainConfig, momenta: Params) -> Params:
    """Directions of matrices [.., out, in]: those of one shape, upright or turned, in one stack [N, short, long]."""
    stacks: dict[tuple[int, ...], list[str]] = {}
    for name in sorted(momenta):
        stacks.setdefault(tuple(sorted(momenta[name].shape[-2:])), []).append(name)
    directions = {}
    for (short, long), names in stacks.items():
        parts = [_upright(momenta[name]) for name in names]
        # rows first, as in global_norm
        parts = [x / (mx.sqrt(mx.square(x).sum(axis=2, keepdims=True).sum(axis=1, keepdims=True)) + train.eps) for x in parts]
        stack_NSL = newton_schulz(mx.concatenate(parts).astype(_DTYPES[train.dtype]), train.muon_steps)
        start = 0
        for name, part in zip(names, parts, strict=True):
            x = stack_NSL[start : start + len(part)].astype(mx.float32) * (MUON_RMS * long**0.5)
            start += len(part)
            shape = momenta[name].shape
            directions[name] = (x if shape[-2] == short else x.swapaxes(1, 2)).reshape(shape)
    return directions


def _upright(matrices: mx.array) -> mx.array:
    """[.., out, in] as [N, short, long]."""
    x = matrices.reshape(-1, *matrices.shape[-2:])
    return x.swapaxes(1, 2) if x.shape[1] > x.shape[2] else x


def newton_schulz(x_NSL: mx.array, steps: int) -> mx.array:
    """Matrices of norm at most 1, [N, short, long], with their singular values driven to about 1; in the dtype given."""
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        gram_NSS = x_NSL @ x_NSL.swapaxes(1, 2)
        x_NSL = a * x_NSL + (b * gram_NSS + c * (gram_NSS @ gram_NSS)) @ x_NSL
    return x_NSL


_DIRECTIONS = {"adamw": _adamw, "muon": _muon, "lion": _lion}
