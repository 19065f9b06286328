"""The loss of a student and its teacher (smedjan_common.training.distillation) without keeping the logits of either.

    objective = (1 - a) CE + a T^2 KL(p || q) + z_loss * sum of lse^2        sums over the counted tokens; p, q: softmax of logits / T
    dlogits = (1 - a) (softmax - onehot) + a T (q - p) + 2 z_loss lse softmax

As the head of other objectives (loss.py): loss and gradients in one pass, in chunks of tokens; a chunk has the logits of both models, so
it is half as long. The teacher's are made from what its last layer gives, and have no gradient.

Shapes: N tokens, D width, U width of the teacher, V vocabulary, the same rows in both heads.
"""

from typing import Any, NamedTuple, cast

import mlx.core as mx

from smedjan_common.training.distillation import Mixed
from smedjan_mlx.loss import _logits, _split, _token_losses


class Taught(NamedTuple):
    """What a teacher gives to the tokens of a batch: what its head reads, [B, T, U], and the head, [V, U]."""

    hidden: mx.array
    head: mx.array


def distilled_cross_entropy(
    hidden: mx.array, embed: mx.array, targets: mx.array, taught: Taught, mixed: Mixed, z_loss: float, frozen: bool = False
) -> tuple[mx.array, mx.array, mx.array]:
    """Objective, to differentiate by `hidden` [B, T, D] and `embed`; CE and KL, to report: sums over targets >= 0, float32 scalars.

    frozen: embed does not move, so its gradient is not computed; it is 0.
    """
    x_ND, u_NU = hidden.reshape(-1, hidden.shape[-1]), taught.hidden.reshape(-1, taught.hidden.shape[-1])
    found = cast(tuple[mx.array, ...], _summed(x_ND, embed, targets.reshape(-1), u_NU, taught.head, *mixed, z_loss, frozen))
    objective, ce, kl, *_ = found
    return objective, ce, kl


@mx.custom_function
def _summed(x_ND, embed_VD, targets, u_NU, head_VU, known, temperature, alpha, z_loss, frozen) -> tuple[mx.array, ...]:
    """Objective, CE and KL, and beside them the gradients of the objective by x and, where it is not frozen, E, which `_backward` takes
    from here."""
    mixed = Mixed(known, temperature, alpha)
    weight_VD, taught_VU = embed_VD.astype(x_ND.dtype), head_VU.astype(u_NU.dtype)
    ce, kl, penalty, dembed_VD, dx = mx.array(0.0), mx.array(0.0), mx.array(0.0), None if frozen else mx.zeros(embed_VD.shape), []
    for x_CD, targets_C, u_CU in _split(2 * len(embed_VD), x_ND, targets, u_NU):
        ce_C, kl_C, squared_C, dlogits_CV = _losses_and_gradients(
            _logits(x_CD, weight_VD), _logits(u_CU, taught_VU), targets_C, mixed, z_loss
        )
        dlogits_CV = dlogits_CV.astype(x_CD.dtype)
        if dembed_VD is not None:
            dembed_VD = dembed_VD + (dlogits_CV.T @ x_CD).astype(mx.float32)
        ce, kl, penalty = ce + ce_C.sum(), kl + kl_C.sum(), penalty + squared_C.sum()
        dx.append(dlogits_CV @ weight_VD)
    return (mixed.loss(ce, kl) + z_loss * penalty, ce, kl, mx.concatenate(dx), *([] if dembed_VD is None else [dembed_VD]))


@_summed.vjp
def _backward(primals, cotangents, outputs):
    _, embed_VD, targets, u_NU, head_VU, *settings = primals
    (*_, dx_ND), dembed, cotangent = outputs[:4], outputs[4:], cotangents[0]
    by_embed: Any = dembed[0] * cotangent if dembed else mx.zeros_like(embed_VD)
    return (dx_ND * cotangent).astype(dx_ND.dtype), by_embed, *map(mx.zeros_like, (targets, u_NU, head_VU)), *settings


def _losses_and_gradients(logits_CV: mx.array, taught_CV: mx.array, targets_C: mx.array, mixed: Mixed, z_loss: float):
    """CE, KL and lse^2 of every token, and dlogits, float32: 0 where a target does not count."""
    counted_C, (ce_C, lse_C, hit_CV) = targets_C >= 0, _token_losses(logits_CV, targets_C)
    known_CV = mx.arange(logits_CV.shape[1])[None, :] < mixed.known
    logp_CV, logq_CV = (_log_probabilities(each, known_CV, mixed.temperature) for each in (taught_CV, logits_CV))
    p_CV = mx.exp(logp_CV)
    kl_C = mx.where(known_CV, p_CV * (logp_CV - logq_CV), 0.0).sum(axis=-1)
    softmax_CV = mx.exp(logits_CV - lse_C[:, None])
    dlogits_CV = (1 - mixed.alpha) * (softmax_CV - hit_CV) + mixed.alpha * mixed.temperature * (mx.exp(logq_CV) - p_CV)
    if z_loss:
        dlogits_CV = dlogits_CV + 2 * z_loss * lse_C[:, None] * softmax_CV
    kl_C, squared_C = (mx.where(counted_C, each, 0.0) for each in (kl_C, mx.square(lse_C)))
    return ce_C, kl_C, squared_C, mx.where(counted_C[:, None], dlogits_CV, 0.0)


def _log_probabilities(logits_CV: mx.array, known_CV: mx.array, temperature: float) -> mx.array:
    """log softmax of logits over the temperature, over the tokens that are known; -inf elsewhere."""
    scaled_CV = mx.where(known_CV, logits_CV / temperature, -mx.inf)
    return scaled_CV - mx.logsumexp(scaled_CV, axis=-1, keepdims=True)
