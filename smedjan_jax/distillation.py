"""The loss of a student and its teacher (smedjan_common.training.distillation) without keeping the logits of either.

    objective = (1 - a) CE + a T^2 KL(p || q) + z_loss * sum of lse^2        sums over the counted tokens; p, q: softmax of logits / T
    dlogits = (1 - a) (softmax - onehot) + a T (q - p) + 2 z_loss lse softmax

As the head of other objectives (loss.py): loss and gradients in one pass, in chunks of tokens; a chunk has the logits of both models, so
it is half as long. The teacher's are made from what its last layer gives, and have no gradient.

Shapes: N tokens, D width, U width of the teacher, V vocabulary, the same rows in both heads.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from smedjan_common.training.distillation import Mixed
from smedjan_common.training.memory import loss_chunks
from smedjan_jax.loss import _logits, _split, _token_losses


class Taught(NamedTuple):
    """What a teacher gives to the tokens of a batch: what its head reads, [B, T, U], and the head, [V, U]."""

    hidden: jax.Array
    head: jax.Array


def distilled_cross_entropy(
    hidden: jax.Array, embed: jax.Array, targets: jax.Array, taught: Taught, mixed: Mixed, z_loss: float, frozen: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Objective, to differentiate by `hidden` [B, T, D] and `embed`; CE and KL, to report: sums over targets >= 0, float32 scalars.

    frozen: embed does not move, so its gradient is not computed; it is 0.
    """
    x_ND, u_NU = hidden.reshape(-1, hidden.shape[-1]), taught.hidden.reshape(-1, taught.hidden.shape[-1])
    chunks = loss_chunks(len(x_ND), 2 * embed.shape[0])
    return _summed(x_ND, embed, targets.reshape(-1), u_NU, taught.head, chunks, mixed, z_loss, frozen)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7, 8))
def _summed(x_ND, embed_VD, targets, u_NU, head_VU, chunks, mixed, z_loss, frozen) -> tuple[jax.Array, jax.Array, jax.Array]:
    return _forward(x_ND, embed_VD, targets, u_NU, head_VU, chunks, mixed, z_loss, frozen)[0]


def _forward(x_ND, embed_VD, targets, u_NU, head_VU, chunks, mixed, z_loss, frozen):
    weight_VD, taught_VU = embed_VD.astype(x_ND.dtype), head_VU.astype(u_NU.dtype)

    def add(carry, chunk):
        sums, dembed_VD = carry
        x_CD, targets_C, u_CU = chunk
        *found, dlogits_CV = _losses_and_gradients(_logits(x_CD, weight_VD), _logits(u_CU, taught_VU), targets_C, mixed, z_loss)
        dlogits_CV = dlogits_CV.astype(x_CD.dtype)
        if not frozen:
            dembed_VD += jnp.matmul(dlogits_CV.T, x_CD, preferred_element_type=jnp.float32)
        return (tuple(total + one_C.sum() for total, one_C in zip(sums, found, strict=True)), dembed_VD), dlogits_CV @ weight_VD

    start = (jnp.zeros((), jnp.float32),) * 3, None if frozen else jnp.zeros(embed_VD.shape, jnp.float32)
    if chunks == 1:
        ((ce, kl, penalty), dembed_VD), dx = add(start, (x_ND, targets, u_NU))
    else:
        ((ce, kl, penalty), dembed_VD), dx = jax.lax.scan(add, start, _split(chunks, x_ND, targets, u_NU))
    return (mixed.loss(ce, kl) + z_loss * penalty, ce, kl), (dx.reshape(-1, x_ND.shape[1])[: len(x_ND)], dembed_VD)


def _backward(chunks, mixed, z_loss, frozen, saved, cotangents):
    (dx_ND, dembed_VD), (cotangent, *_) = saved, cotangents
    return (dx_ND * cotangent).astype(dx_ND.dtype), None if frozen else dembed_VD * cotangent, None, None, None


_summed.defvjp(_forward, _backward)


def _losses_and_gradients(logits_CV: jax.Array, taught_CV: jax.Array, targets_C: jax.Array, mixed: Mixed, z_loss: float):
    """CE, KL and lse^2 of every token, and dlogits, float32: 0 where a target does not count."""
    counted_C, (ce_C, lse_C, hit_CV) = targets_C >= 0, _token_losses(logits_CV, targets_C)
    known_CV = jax.lax.broadcasted_iota(jnp.int32, logits_CV.shape, 1) < mixed.known
    logp_CV, logq_CV = (_log_probabilities(each, known_CV, mixed.temperature) for each in (taught_CV, logits_CV))
    p_CV = jnp.exp(logp_CV)
    kl_C = jnp.where(known_CV, p_CV * (logp_CV - logq_CV), 0.0).sum(axis=-1)
    softmax_CV = jnp.exp(logits_CV - lse_C[:, None])
    dlogits_CV = (1 - mixed.alpha) * (softmax_CV - hit_CV) + mixed.alpha * mixed.temperature * (jnp.exp(logq_CV) - p_CV)
    if z_loss:
        dlogits_CV += 2 * z_loss * lse_C[:, None] * softmax_CV
    kl_C, squared_C = (jnp.where(counted_C, each, 0.0) for each in (kl_C, jnp.square(lse_C)))
    return ce_C, kl_C, squared_C, jnp.where(counted_C[:, None], dlogits_CV, 0.0)


def _log_probabilities(logits_CV: jax.Array, known_CV: jax.Array, temperature: float) -> jax.Array:
    """log softmax of logits over the temperature, over the tokens that are known; -inf elsewhere."""
    return jax.nn.log_softmax(jnp.where(known_CV, logits_CV / temperature, -jnp.inf), axis=-1)
