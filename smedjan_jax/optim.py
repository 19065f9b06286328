"""Optimizers over flat dicts of arrays (equations: smedjan_common.reference.optim), plus clipping by the global norm.

    p <- p - lr lr_scale (direction + decay p)

A row of smedjan_common.training.optimizers has its directions here. optax's transforms with every constant given, but for muon: optax
takes matrix after matrix, here those of equal shape go through Newton-Schulz as one batch, in the compute dtype. The slots
and the number of steps are what a checkpoint keeps.
"""

from typing import cast

import jax
import jax.numpy as jnp
import optax

from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.model.adapters import trained_table
from smedjan_common.model.parameter import ParamSpec
from smedjan_common.training.optimizers import EMA, MUON_RMS, NEWTON_SCHULZ, slot_names
from smedjan_common.training.precision import compute_dtype

Params = dict[str, jax.Array]
Slots = dict[str, Params]


def init(model: ModelConfig, train: TrainConfig, params: Params) -> Slots:
    """Slots of the optimizer, zeros like the parameters that have them; averages are copies of them."""
    make, slots = {EMA: jnp.array}, slot_names(model, train.optimizer, train.ema, train.adapters)
    return {slot: {name: make.get(slot, jnp.zeros_like)(params[name]) for name in names} for slot, names in slots.items()}


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
    model: ModelConfig, train: TrainConfig, params: Params, grads: Params, slots: Slots, step: jax.Array, lr: jax.Array
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


def _averages(train: TrainConfig, slots: Slots, moved: Params, step: jax.Array) -> Slots:
    """The moving averages of the parameters that moved; none without --ema."""
    if not train.ema:
        return {}
    done = step.astype(jnp.float32)
    decay = jnp.minimum(train.ema, (1 + done) / (10 + done))
    return {EMA: {name: decay * slots[EMA][name] + (1 - decay) * value for name, value in moved.items()}}


def _adamw(train: TrainConfig, specs: dict[str, ParamSpec], grads: Params, slots: Slots, step: jax.Array) -> tuple[Params, Slots]:
    adam = optax.scale_by_adam(b1=train.beta1, b2=train.beta2, eps=train.eps, eps_root=0.0)
    moments = optax.ScaleByAdamState(count=step, mu=slots["mu"], nu=slots["nu"])
    directions, moments = cast(tuple[Params, optax.ScaleByAdamState], adam.update(grads, moments))
    return directions, {"mu": cast(Params, moments.mu), "nu": cast(Params, moments.nu)}


def _lion(train: TrainConfig, specs: dict[str, ParamSpec], grads: Params, slots: Slots, step: jax.Array) -> tuple[Params, Slots]:
    lion = optax.scale_by_lion(b1=train.beta1, b2=train.beta2)
    moments = optax.ScaleByLionState(count=step, mu=slots["mu"])
    directions, moments = cast(tuple[Params, optax.ScaleByLionState], lion.update(grads, moments))
    return directions, {"mu": cast(Params, moments.mu)}


def _muon(train: TrainConfig, specs: dict[str, ParamSpec], grads: Params, slots: Slots, step: jax.Array) -> tuple[Params, Slots]:
    others = {name: grad for name, grad in grads.items() if not specs[name].matrix}
    directions, moments = _adamw(train, specs, others, {**slots, "mu": {name: slots["mu"][name] for name in others}}, step)
    beta, count, ahead = train.muon_momentum, (step + 1).astype(jnp.float32), {}
    now, later = 1 - jnp.power(beta, count), 1 - jnp.power(beta, count + 1)
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
        parts = [x / (jnp.sqrt(jnp.sum(jnp.square(x), axis=(1, 2), keepdims=True)) + train.eps) for x in parts]
        stack_NSL = newton_schulz(jnp.concatenate(parts).astype(compute_dtype(train.dtype)), train.muon_steps)
        start = 0
        for name, part in zip(names, parts, strict=True):
            x = stack_NSL[start : start + len(part)].astype(jnp.float32) * (MUON_RMS * long**0.5)
            start += len(part)
            shape = momenta[name].shape
            directions[name] = (x if shape[-2] == short else x.swapaxes(1, 2)).reshape(shape)
    return directions


def _upright(matrices: jax.Array) -> jax.Array:
    """[.., out, in] as [N, short, long]."""
    x = matrices.reshape(-1, *matrices.shape[-2:])
    return x.swapaxes(1, 2) if x.shape[1] > x.shape[2] else x


def newton_schulz(x_NSL: jax.Array, steps: int) -> jax.Array:
    """Matrices of norm at most 1, [N, short, long], with their singular values driven to about 1; in the dtype given."""
    a, b, c = NEWTON_SCHULZ
    for _ in range(steps):
        gram_NSS = x_NSL @ x_NSL.swapaxes(1, 2)
        x_NSL = a * x_NSL + (b * gram_NSS + c * (gram_NSS @ gram_NSS)) @ x_NSL
    return x_NSL


_DIRECTIONS = {"adamw": _adamw, "muon": _muon, "lion": _lion}
