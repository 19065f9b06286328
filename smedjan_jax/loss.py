"""Cross-entropy of the tied head without keeping the logits: loss and its gradients in one pass, in chunks of tokens.

    loss = sum over counted tokens of lse - (x E^T)[target],   lse = logsumexp(x E^T)
    objective = loss + z_loss * sum over counted tokens of lse^2          (PaLM, Chowdhery et al., 2022: keeps lse near 0)
    dlogits = softmax (1 + 2 z_loss lse) - onehot

The forward pass of the derivative computes dx = dlogits E and dE = dlogits^T x at once, so the backward pass only scales
them: three matmuls, no logits kept, nothing computed twice. Logits, logsumexp and the sum are float32; dlogits is cast
to the compute dtype, or both gradient matmuls would run at float32 speed, a tenth of bfloat16's.

Shapes: N tokens, D width, V vocabulary. A target of -1 does not count.
"""

import functools

import jax
import jax.numpy as jnp

from smedjan_common.backend import IGNORED
from smedjan_common.training.memory import loss_chunks


def cross_entropy(hidden: jax.Array, embed: jax.Array, targets: jax.Array, z_loss: float) -> tuple[jax.Array, jax.Array]:
    """Objective, to differentiate, and loss, to report: sums over targets >= 0 in nats, float32 scalars. Divide by the counted
    tokens for the means."""
    return _summed(*_flat(hidden, embed, targets), z_loss, False)


def cross_entropy_by_kernel(hidden: jax.Array, embed: jax.Array, targets: jax.Array, z_loss: float) -> tuple[jax.Array, jax.Array]:
    """The same, with one pass over the logits instead of three (kernels/loss.py)."""
    return _summed(*_flat(hidden, embed, targets), z_loss, True)


def forward_loss(hidden: jax.Array, embed: jax.Array, targets: jax.Array) -> jax.Array:
    """The same loss for evaluation: no gradient is computed along the way."""
    x_ND, embed_VD, targets_N, chunks = _flat(hidden, embed, targets)
    weight_VD = embed_VD.astype(x_ND.dtype)

    def add(total, chunk):
        return total + _token_losses(_logits(chunk[0], weight_VD), chunk[1])[0].sum(), None

    return jax.lax.scan(add, jnp.zeros((), jnp.float32), _split(x_ND, targets_N, chunks))[0]


def _flat(hidden: jax.Array, embed: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, int]:
    tokens = targets.size
    return hidden.reshape(tokens, -1), embed, targets.reshape(tokens), loss_chunks(tokens, embed.shape[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _summed(
    x_ND: jax.Array, embed_VD: jax.Array, targets_N: jax.Array, chunks: int, z_loss: float, by_kernel: bool
) -> tuple[jax.Array, jax.Array]:
    return _forward(x_ND, embed_VD, targets_N, chunks, z_loss, by_kernel)[0]


def _forward(x_ND, embed_VD, targets_N, chunks, z_loss, by_kernel):
    weight_VD, differentiated = embed_VD.astype(x_ND.dtype), _losses_and_gradients
    if by_kernel:
        from smedjan_jax.kernels.loss import losses_and_gradients as differentiated

    def add(carry, chunk):
        total, penalty, dembed_VD = carry
        x_CD, targets_C = chunk
        losses_C, lse_C, dlogits_CV = differentiated(_logits(x_CD, weight_VD), targets_C, z_loss, x_CD.dtype)
        if z_loss:
            penalty += jnp.where(targets_C >= 0, jnp.square(lse_C), 0.0).sum()
        dembed_VD += jnp.matmul(dlogits_CV.T, x_CD, preferred_element_type=jnp.float32)
        return (total + losses_C.sum(), penalty, dembed_VD), dlogits_CV @ weight_VD

    start = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32), jnp.zeros(embed_VD.shape, jnp.float32))
    if chunks == 1:  # the same without a loop, which XLA fuses better
        (total, penalty, dembed_VD), dx = add(start, (x_ND, targets_N))
    else:
        (total, penalty, dembed_VD), dx = jax.lax.scan(add, start, _split(x_ND, targets_N, chunks))
    objective = total + z_loss * penalty if z_loss else total
    return (objective, total), (dx.reshape(-1, x_ND.shape[1])[: x_ND.shape[0]], dembed_VD)


def _backward(chunks, z_loss, by_kernel, saved, cotangents):
    (dx_ND, dembed_VD), (cotangent, _) = saved, cotangents
    return (dx_ND * cotangent).astype(dx_ND.dtype), dembed_VD * cotangent, None


_summed.defvjp(_forward, _backward)


def _split(x_ND: jax.Array, targets_N: jax.Array, chunks: int) -> tuple[jax.Array, jax.Array]:
    """Equal chunks, [chunks, C, D] and [chunks, C]; tokens that do not count fill the last one."""
    missing = -targets_N.size % chunks
    x_ND, targets_N = jnp.pad(x_ND, ((0, missing), (0, 0))), jnp.pad(targets_N, (0, missing), constant_values=IGNORED)
    return x_ND.reshape(chunks, -1, x_ND.shape[1]), targets_N.reshape(chunks, -1)


def _logits(x_ND: jax.Array, weight_VD: jax.Array) -> jax.Array:
    return jnp.matmul(x_ND, weight_VD.T, preferred_element_type=jnp.float32)


def _losses_and_gradients(logits_CV: jax.Array, targets_C: jax.Array, z_loss: float, dtype: jnp.dtype):
    """Loss of every token, logsumexp, and dlogits in `dtype`."""
    losses_C, lse_C, hit_CV = _token_losses(logits_CV, targets_C)
    softmax_CV = jnp.exp(logits_CV - lse_C[:, None])
    if z_loss:
        softmax_CV *= 1 + 2 * z_loss * lse_C[:, None]
    return losses_C, lse_C, jnp.where((targets_C >= 0)[:, None], softmax_CV - hit_CV, 0.0).astype(dtype)


def _token_losses(logits_NV: jax.Array, targets_N: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Loss of every token (0 where the target is negative), logsumexp, and the one-hot targets."""
    lse_N = jax.nn.logsumexp(logits_NV, axis=-1)
    hit_NV = jax.lax.broadcasted_iota(jnp.int32, logits_NV.shape, 1) == targets_N[:, None]
    target_logit_N = jnp.where(hit_NV, logits_NV, 0.0).sum(axis=-1)  # a compare fuses into the reduction, a gather does not
    return jnp.where(targets_N >= 0, lse_N - target_logit_N, 0.0), lse_N, hit_NV
