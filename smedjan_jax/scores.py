"""What the head gives to chosen positions: log-probabilities, which of them are the largest, the logits themselves.

    log p = (x W^T)[target] - logsumexp(x W^T)

over the model's own tokens: the rows that pad the vocabulary are cut off. Products of bfloat16 are kept in float32.

Shapes: B batch, T positions, D width, V padded vocabulary, N chosen positions, numbered through [B, T].
"""

import jax
import jax.numpy as jnp


def scores(
    hidden: jax.Array, head: jax.Array, places: jax.Array, targets: jax.Array, vocab: int, top: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of targets [N] at `places` [N]: log-probability, whether it is the most probable (of equals the smallest id is), and the ids and
    log-probabilities of the `top` most probable [N, top]. hidden [B, T, D], head [V, D]."""
    logits_NV = logits(hidden, head, places, vocab)
    lse_N = jax.nn.logsumexp(logits_NV, axis=-1)
    target_logit_N = jnp.take_along_axis(logits_NV, targets[:, None], axis=-1)[:, 0]
    greedy_N = jnp.argmax(logits_NV, axis=-1) == targets
    largest_NK, ids_NK = jax.lax.top_k(logits_NV, top)
    return target_logit_N - lse_N, greedy_N, ids_NK, largest_NK - lse_N[:, None]


def logits(hidden: jax.Array, head: jax.Array, places: jax.Array, vocab: int) -> jax.Array:
    """float32 [N, vocab]."""
    x_ND = hidden.reshape(-1, hidden.shape[-1])[places]
    return jnp.matmul(x_ND, head[:vocab].astype(x_ND.dtype).T, preferred_element_type=jnp.float32)
