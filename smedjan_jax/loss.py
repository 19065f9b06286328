"""Cross-entropy of the tied head without keeping the logits: loss and its gradients in one pass, in chunks of tokens.

    loss = sum over counted tokens of lse - (x E^T)[target],   lse = logsumexp(x E^T)
    objective = loss + z_loss * sum over counted tokens of lse^2          (PaLM, Chowdhery et al., 2022: keeps lse near 0)
    dlogits = softmax (1 + 2 z_loss lse) - onehot

With a weight w for each token, of any sign, or K targets for each with their weights:

    loss = sum_t sum_k w_tk (lse_t - logit[target_tk])      dlogits = softmax (sum_k w_k + 2 z_loss lse) - sum_k w_k onehot_k

A loss L of the log-probabilities of tokens (of pairs, say) has the gradient of this one with w = dL / d(-log p), held constant. So the
heads of all objectives are one. The z-loss does not know of weights: its tokens are those with a target.

The forward pass of the derivative computes dx = dlogits E and dE = dlogits^T x at once, so the backward pass only scales
them: three matmuls, no logits kept, nothing computed twice. Logits, logsumexp and the sum are float32; dlogits is cast
to the compute dtype, or both gradient matmuls would run at float32 speed, a tenth of bfloat16's.

Shapes: N tokens, K targets of a token, D width, V vocabulary. A target of -1 does not count.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from smedjan_common.backend import IGNORED
from smedjan_common.training.memory import loss_chunks


def cross_entropy(
    hidden: jax.Array, embed: jax.Array, targets: jax.Array, z_loss: float, weights: jax.Array | None = None, frozen: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Objective, to differentiate, and loss, to report: sums over targets >= 0 in nats, float32 scalars. Divide by the counted
    tokens for the means.

    hidden [B, T, D]; targets [B, T]; with weights, float32 of the shape of targets, also [B, T, K], K being small. Weights are constants.
    frozen: embed does not move, so its gradient is not computed; it is 0.
    """
    return _summed(*_flat(hidden, embed, targets, weights), z_loss, False, frozen)


def cross_entropy_by_kernel(
    hidden: jax.Array, embed: jax.Array, targets: jax.Array, z_loss: float, weights: jax.Array | None = None, frozen: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The same, with one pass over the logits instead of three (kernels/loss.py)."""
    return _summed(*_flat(hidden, embed, targets, weights), z_loss, True, frozen)


def token_losses(hidden: jax.Array, embed: jax.Array, targets: jax.Array) -> jax.Array:
    """The loss of each token, float32 [B, T], 0 where the target does not count: no gradient is computed along the way."""
    x_ND, embed_VD, targets_N, _, chunks = _flat(hidden, embed, targets)
    weight_VD = embed_VD.astype(x_ND.dtype)

    def one(chunk):
        return _token_losses(_logits(chunk[0], weight_VD), chunk[1])[0]

    return jax.lax.map(one, _split(chunks, x_ND, targets_N)).reshape(-1)[: targets.size].reshape(targets.shape)


def forward_loss(hidden: jax.Array, embed: jax.Array, targets: jax.Array) -> jax.Array:
    """The same loss for evaluation, summed."""
    return token_losses(hidden, embed, targets).sum()


def _flat(hidden: jax.Array, embed: jax.Array, targets: jax.Array, weights: jax.Array | None = None) -> tuple[Any, ...]:
    """Tokens in a row; with weights targets and weights are [N, K]."""
    x_ND = hidden.reshape(-1, hidden.shape[-1])
    tokens = len(x_ND)
    chunks = loss_chunks(tokens, embed.shape[0])
    if weights is None:
        return x_ND, embed, targets.reshape(tokens), None, chunks
    assert weights.shape == targets.shape
    return x_ND, embed, targets.reshape(tokens, -1), weights.astype(jnp.float32).reshape(tokens, -1), chunks


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _summed(
    x_ND: jax.Array,
    embed_VD: jax.Array,
    targets: jax.Array,
    weights_NK: jax.Array | None,
    chunks: int,
    z_loss: float,
    by_kernel: bool,
    frozen: bool,
) -> tuple[jax.Array, jax.Array]:
    return _forward(x_ND, embed_VD, targets, weights_NK, chunks, z_loss, by_kernel, frozen)[0]


def _forward(x_ND, embed_VD, targets, weights_NK, chunks, z_loss, by_kernel, frozen):
    weight_VD, differentiated = embed_VD.astype(x_ND.dtype), _losses_and_gradients
    if by_kernel:
        from smedjan_jax.kernels.loss import losses_and_gradients as differentiated

    def add(carry, chunk):
        total, penalty, dembed_VD = carry
        x_CD, targets_C, weights_CK = chunk
        losses_C, lse_C, dlogits_CV = differentiated(_logits(x_CD, weight_VD), targets_C, weights_CK, z_loss, x_CD.dtype)
        if z_loss:
            penalty += jnp.where(_counted(targets_C), jnp.square(lse_C), 0.0).sum()
        if not frozen:
            dembed_VD += jnp.matmul(dlogits_CV.T, x_CD, preferred_element_type=jnp.float32)
        return (total + losses_C.sum(), penalty, dembed_VD), dlogits_CV @ weight_VD

    nothing = jnp.zeros((), jnp.float32)
    start = (nothing, nothing, None if frozen else jnp.zeros(embed_VD.shape, jnp.float32))
    if chunks == 1:  # the same without a loop, which XLA fuses better
        (total, penalty, dembed_VD), dx = add(start, (x_ND, targets, weights_NK))
    else:
        (total, penalty, dembed_VD), dx = jax.lax.scan(add, start, _split(chunks, x_ND, targets, weights_NK))
    objective = total + z_loss * penalty if z_loss else total
    return (objective, total), (dx.reshape(-1, x_ND.shape[1])[: x_ND.shape[0]], dembed_VD)


def _backward(chunks, z_loss, by_kernel, frozen, saved, cotangents):
    (dx_ND, dembed_VD), (cotangent, _) = saved, cotangents
    return (dx_ND * cotangent).astype(dx_ND.dtype), None if frozen else dembed_VD * cotangent, None, None


_summed.defvjp(_forward, _backward)


def _split(chunks: int, x_ND: jax.Array, targets: jax.Array, *weights: jax.Array | None) -> tuple[jax.Array | None, ...]:
    """Equal chunks, [chunks, C, …] of each; tokens that do not count fill the last one."""

    def split(array: jax.Array | None, filled: int) -> jax.Array | None:
        if array is None:
            return None
        missing = ((0, -len(array) % chunks), *((0, 0) for _ in array.shape[1:]))
        return jnp.pad(array, missing, constant_values=filled).reshape(chunks, -1, *array.shape[1:])

    return split(x_ND, 0), split(targets, IGNORED), *(split(each, 0) for each in weights)


def _logits(x_ND: jax.Array, weight_VD: jax.Array) -> jax.Array:
    return jnp.matmul(x_ND, weight_VD.T, preferred_element_type=jnp.float32)


def _losses_and_gradients(logits_CV: jax.Array, targets: jax.Array, weights_CK: jax.Array | None, z_loss: float, dtype: jnp.dtype):
    """Loss of every token, logsumexp, and dlogits in `dtype`."""
    if weights_CK is not None:
        return _weighted(logits_CV, targets, weights_CK, z_loss, dtype)
    losses_C, lse_C, hit_CV = _token_losses(logits_CV, targets)
    softmax_CV = jnp.exp(logits_CV - lse_C[:, None])
    if z_loss:
        softmax_CV *= 1 + 2 * z_loss * lse_C[:, None]
    return losses_C, lse_C, jnp.where((targets >= 0)[:, None], softmax_CV - hit_CV, 0.0).astype(dtype)


def _weighted(logits_CV: jax.Array, targets_CK: jax.Array, weights_CK: jax.Array, z_loss: float, dtype: jnp.dtype):
    """The same with weights; a token is as many targets as it has, one after the other."""
    losses_C = scale_C = jnp.zeros(len(logits_CV))
    aims_CV = jnp.zeros(logits_CV.shape)
    for targets_C, weights_C in zip(targets_CK.T, weights_CK.T, strict=True):
        one_C, lse_C, hit_CV = _token_losses(logits_CV, targets_C)
        weights_C = jnp.where(targets_C >= 0, weights_C, 0.0)
        losses_C, scale_C = losses_C + weights_C * one_C, scale_C + weights_C
        aims_CV += jnp.where(hit_CV, weights_C[:, None], 0.0)
    if z_loss:
        scale_C += 2 * z_loss * lse_C
    dlogits_CV = jnp.exp(logits_CV - lse_C[:, None]) * scale_C[:, None] - aims_CV
    return losses_C, lse_C, jnp.where(_counted(targets_CK)[:, None], dlogits_CV, 0.0).astype(dtype)


def _counted(targets: jax.Array) -> jax.Array:
    """Whether a token counts, bool [C]: it has a target."""
    return (targets >= 0) if targets.ndim == 1 else (targets >= 0).any(axis=1)


def _token_losses(logits_NV: jax.Array, targets_N: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Loss of every token (0 where the target is negative), logsumexp, and the one-hot targets."""
    lse_N = jax.nn.logsumexp(logits_NV, axis=-1)
    hit_NV = jax.lax.broadcasted_iota(jnp.int32, logits_NV.shape, 1) == targets_N[:, None]
    target_logit_N = jnp.where(hit_NV, logits_NV, 0.0).sum(axis=-1)  # a compare fuses into the reduction, a gather does not
    return jnp.where(targets_N >= 0, lse_N - target_logit_N, 0.0), lse_N, hit_NV
