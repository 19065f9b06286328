"""Cross-entropy of the tied head without keeping the logits: loss and its gradients in one pass, in chunks of tokens.

    loss = sum over counted tokens of lse - (x E^T)[target],   lse = logsumexp(x E^T)
    objective = loss + z_loss * sum over counted tokens of lse^2          (PaLM, Chowdhery et al., 2022: keeps lse near 0)
    dlogits = softmax (1 + 2 z_loss lse) - onehot

With a weight w for each token, of any sign, or K targets for each with their weights:

    loss = sum_t sum_k w_tk (lse_t - logit[target_tk])      dlogits = softmax (sum_k w_k + 2 z_loss lse) - sum_k w_k onehot_k

A loss L of the log-probabilities of tokens (of pairs, say) has the gradient of this one with w = dL / d(-log p), held constant. So the
heads of all objectives are one. The z-loss does not know of weights: its tokens are those with a target.

The forward pass of the derivative computes dx = dlogits E and dE = dlogits^T x at once, so the backward pass only scales
them: three matmuls, no logits kept, nothing computed twice. Logsumexp and the sum are float32; dlogits is cast to the
compute dtype, or both gradient matmuls would run at float32 speed.

A product of bfloat16 matrices is summed in float32 and rounded to bfloat16: MLX has no other. So in bfloat16 logits, and what each
chunk adds to dE, have 8 bits; JAX keeps float32 there.

Shapes: N tokens, K targets of a token, D width, V vocabulary. A target of -1 does not count.
"""

from typing import Any, cast

import mlx.core as mx

from smedjan_common.training.memory import loss_chunks


def cross_entropy(
    hidden: mx.array, embed: mx.array, targets: mx.array, z_loss: float, weights: mx.array | None = None, frozen: bool = False
) -> tuple[mx.array, mx.array]:
    """Objective, to differentiate, and loss, to report: sums over targets >= 0 in nats, float32 scalars. Divide by the counted
    tokens for the means.

    hidden [B, T, D]; targets [B, T]; with weights, float32 of the shape of targets, also [B, T, K], K being small. Weights are constants.
    frozen: embed does not move, so its gradient is not computed; it is 0.
    """
    objective, total, *_ = cast(tuple[mx.array, ...], _summed(*_flat(hidden, embed, targets, weights), z_loss, frozen))
    return objective, total


def token_losses(hidden: mx.array, embed: mx.array, targets: mx.array) -> mx.array:
    """The loss of each token, float32 [B, T], 0 where the target does not count: no gradient is computed along the way."""
    x_ND, embed_VD, targets_N, _ = _flat(hidden, embed, targets)
    weight_VD = embed_VD.astype(x_ND.dtype)
    parts = _split(len(embed_VD), x_ND, targets_N)
    losses = [_token_losses(_logits(x_CD, weight_VD), targets_C)[0] for x_CD, targets_C in parts]
    return mx.concatenate(losses).reshape(targets.shape)


def forward_loss(hidden: mx.array, embed: mx.array, targets: mx.array) -> mx.array:
    """The same loss for evaluation, summed."""
    return token_losses(hidden, embed, targets).sum()


def _flat(hidden: mx.array, embed: mx.array, targets: mx.array, weights: mx.array | None = None) -> tuple[Any, ...]:
    """Tokens in a row; with weights targets and weights are [N, K]."""
    x_ND = hidden.reshape(-1, hidden.shape[-1])
    tokens = len(x_ND)
    if weights is None:
        return x_ND, embed, targets.reshape(tokens), None
    assert weights.shape == targets.shape
    return x_ND, embed, targets.reshape(tokens, -1), weights.astype(mx.float32).reshape(tokens, -1)


@mx.custom_function
def _summed(
    x_ND: mx.array, embed_VD: mx.array, targets: mx.array, weights_NK: mx.array | None, z_loss: float, frozen: bool
) -> tuple[mx.array, ...]:
    """Objective and loss, and beside them the gradients of the objective by x and, where it is not frozen, E, which `_backward` takes from
    here."""
    weight_VD = embed_VD.astype(x_ND.dtype)
    total, penalty, dembed_VD, dx = mx.array(0.0), mx.array(0.0), None if frozen else mx.zeros(embed_VD.shape), []
    for x_CD, targets_C, weights_CK in _split(len(embed_VD), x_ND, targets, weights_NK):
        losses_C, lse_C, dlogits_CV = _losses_and_gradients(_logits(x_CD, weight_VD), targets_C, weights_CK, z_loss, x_CD.dtype)
        if z_loss:
            penalty = penalty + mx.where(_counted(targets_C), mx.square(lse_C), 0.0).sum()
        total = total + losses_C.sum()
        if dembed_VD is not None:
            dembed_VD = dembed_VD + (dlogits_CV.T @ x_CD).astype(mx.float32)
        dx.append(dlogits_CV @ weight_VD)
    objective = total + z_loss * penalty if z_loss else total
    return (objective, total, mx.concatenate(dx), *([] if dembed_VD is None else [dembed_VD]))


@_summed.vjp
def _backward(primals, cotangents, outputs):
    _, embed_VD, targets, weights_NK, *settings = primals
    (_, _, dx_ND, *dembed), cotangent = outputs, cotangents[0]
    by_embed = dembed[0] * cotangent if dembed else mx.zeros_like(embed_VD)
    by_weights = None if weights_NK is None else mx.zeros_like(weights_NK)
    return (dx_ND * cotangent).astype(dx_ND.dtype), by_embed, mx.zeros_like(targets), by_weights, *settings


def _split(vocab: int, x_ND: mx.array, *arrays: mx.array | None) -> list[tuple[Any, ...]]:
    """Chunks of tokens, [C, …] of each; the last one may be shorter."""
    size = -(-len(x_ND) // loss_chunks(len(x_ND), vocab))
    starts = range(0, len(x_ND), size)
    return [tuple(None if each is None else each[start : start + size] for each in (x_ND, *arrays)) for start in starts]


def _logits(x_ND: mx.array, weight_VD: mx.array) -> mx.array:
    return (x_ND @ weight_VD.T).astype(mx.float32)


def _losses_and_gradients(logits_CV: mx.array, targets: mx.array, weights_CK: mx.array | None, z_loss: float, dtype: mx.Dtype):
    """Loss of every token, logsumexp, and dlogits in `dtype`."""
    if weights_CK is not None:
        return _weighted(logits_CV, targets, weights_CK, z_loss, dtype)
    losses_C, lse_C, hit_CV = _token_losses(logits_CV, targets)
    softmax_CV = mx.exp(logits_CV - lse_C[:, None])
    if z_loss:
        softmax_CV = softmax_CV * (1 + 2 * z_loss * lse_C[:, None])
    return losses_C, lse_C, mx.where((targets >= 0)[:, None], softmax_CV - hit_CV, 0.0).astype(dtype)


def _weighted(logits_CV: mx.array, targets_CK: mx.array, weights_CK: mx.array, z_loss: float, dtype: mx.Dtype):
    """The same with weights; a token is as many targets as it has, one after the other."""
    losses_C = scale_C = mx.zeros(len(logits_CV))
    aims_CV = mx.zeros(logits_CV.shape)
    for targets_C, weights_C in zip(targets_CK.T, weights_CK.T, strict=True):
        one_C, lse_C, hit_CV = _token_losses(logits_CV, targets_C)
        weights_C = mx.where(targets_C >= 0, weights_C, 0.0)
        losses_C, scale_C = losses_C + weights_C * one_C, scale_C + weights_C
        aims_CV = aims_CV + mx.where(hit_CV, weights_C[:, None], 0.0)
    if z_loss:
        scale_C = scale_C + 2 * z_loss * lse_C
    dlogits_CV = mx.exp(logits_CV - lse_C[:, None]) * scale_C[:, None] - aims_CV
    return losses_C, lse_C, mx.where(_counted(targets_CK)[:, None], dlogits_CV, 0.0).astype(dtype)


def _counted(targets: mx.array) -> mx.array:
    """Whether a token counts, bool [C]: it has a target."""
    return (targets >= 0) if targets.ndim == 1 else (targets >= 0).any(axis=1)


def _token_losses(logits_NV: mx.array, targets_N: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Loss of every token (0 where the target is negative), logsumexp, and the one-hot targets."""
    lse_N = mx.logsumexp(logits_NV, axis=-1)
    hit_NV = mx.arange(logits_NV.shape[1])[None, :] == targets_N[:, None]
    target_logit_N = mx.where(hit_NV, logits_NV, 0.0).sum(axis=-1)
    return mx.where(targets_N >= 0, lse_N - target_logit_N, 0.0), lse_N, hit_NV
