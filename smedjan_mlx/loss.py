"""Cross-entropy of the tied head without keeping the logits: loss and its gradients in one pass, in chunks of tokens.

    loss = sum over counted tokens of lse - (x E^T)[target],   lse = logsumexp(x E^T)
    objective = loss + z_loss * sum over counted tokens of lse^2          (PaLM, Chowdhery et al., 2022: keeps lse near 0)
    dlogits = softmax (1 + 2 z_loss lse) - onehot

The forward pass of the derivative computes dx = dlogits E and dE = dlogits^T x at once, so the backward pass only scales
them: three matmuls, no logits kept, nothing computed twice. Logsumexp and the sum are float32; dlogits is cast to the
compute dtype, or both gradient matmuls would run at float32 speed.

A product of bfloat16 matrices is summed in float32 and rounded to bfloat16: MLX has no other. So in bfloat16 logits, and what each
chunk adds to dE, have 8 bits; JAX keeps float32 there.

Shapes: N tokens, D width, V vocabulary. A target of -1 does not count.
"""

from typing import cast

import mlx.core as mx

from smedjan_common.training.memory import loss_chunks


def cross_entropy(hidden: mx.array, embed: mx.array, targets: mx.array, z_loss: float) -> tuple[mx.array, mx.array]:
    """Objective, to differentiate, and loss, to report: sums over targets >= 0 in nats, float32 scalars. Divide by the counted
    tokens for the means."""
    objective, total, _, _ = cast(tuple[mx.array, mx.array, mx.array, mx.array], _summed(*_flat(hidden, embed, targets), z_loss))
    return objective, total


def forward_loss(hidden: mx.array, embed: mx.array, targets: mx.array) -> mx.array:
    """The same loss for evaluation: no gradient is computed along the way."""
    x_ND, embed_VD, targets_N = _flat(hidden, embed, targets)
    weight_VD = embed_VD.astype(x_ND.dtype)
    parts = _split(x_ND, targets_N, embed_VD.shape[0])
    return sum((_token_losses(_logits(x_CD, weight_VD), targets_C)[0].sum() for x_CD, targets_C in parts), mx.array(0.0))


def _flat(hidden: mx.array, embed: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    tokens = targets.size
    return hidden.reshape(tokens, -1), embed, targets.reshape(tokens)


@mx.custom_function
def _summed(x_ND: mx.array, embed_VD: mx.array, targets_N: mx.array, z_loss: float) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Objective and loss, and beside them the gradients of the objective by x and E, which `_backward` takes from here."""
    weight_VD = embed_VD.astype(x_ND.dtype)
    total, penalty, dembed_VD, dx = mx.array(0.0), mx.array(0.0), mx.zeros(embed_VD.shape), []
    for x_CD, targets_C in _split(x_ND, targets_N, embed_VD.shape[0]):
        logits_CV = _logits(x_CD, weight_VD)
        losses_C, lse_C, hit_CV = _token_losses(logits_CV, targets_C)
        counted_C = targets_C >= 0
        softmax_CV = mx.exp(logits_CV - lse_C[:, None])
        if z_loss:
            softmax_CV = softmax_CV * (1 + 2 * z_loss * lse_C[:, None])
            penalty = penalty + mx.where(counted_C, mx.square(lse_C), 0.0).sum()
        dlogits_CV = mx.where(counted_C[:, None], softmax_CV - hit_CV, 0.0).astype(x_CD.dtype)
        total = total + losses_C.sum()
        dembed_VD = dembed_VD + (dlogits_CV.T @ x_CD).astype(mx.float32)
        dx.append(dlogits_CV @ weight_VD)
    objective = total + z_loss * penalty if z_loss else total
    return objective, total, mx.concatenate(dx), dembed_VD


@_summed.vjp
def _backward(primals, cotangents, outputs):
    (_, _, dx_ND, dembed_VD), cotangent = outputs, cotangents[0]
    return (dx_ND * cotangent).astype(dx_ND.dtype), dembed_VD * cotangent, mx.zeros_like(primals[2]), primals[3]


def _split(x_ND: mx.array, targets_N: mx.array, vocab: int) -> list[tuple[mx.array, mx.array]]:
    """Chunks of tokens, [C, D] and [C]; the last one may be shorter."""
    size = -(-targets_N.size // loss_chunks(targets_N.size, vocab))
    starts = range(0, targets_N.size, size)
    return [(x_ND[start : start + size], targets_N[start : start + size]) for start in starts]


def _logits(x_ND: mx.array, weight_VD: mx.array) -> mx.array:
    return (x_ND @ weight_VD.T).astype(mx.float32)


def _token_losses(logits_NV: mx.array, targets_N: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Loss of every token (0 where the target is negative), logsumexp, and the one-hot targets."""
    lse_N = mx.logsumexp(logits_NV, axis=-1)
    hit_NV = mx.arange(logits_NV.shape[1])[None, :] == targets_N[:, None]
    target_logit_N = mx.where(hit_NV, logits_NV, 0.0).sum(axis=-1)
    return mx.where(targets_N >= 0, lse_N - target_logit_N, 0.0), lse_N, hit_NV
