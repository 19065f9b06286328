"""What the head gives to chosen positions: log-probabilities, which of them are the largest, the logits themselves.

    log p = (x W^T)[target] - logsumexp(x W^T)

over the model's own tokens: the rows that pad the vocabulary are cut off. MLX rounds products of bfloat16 to bfloat16, which moves a
log-probability by 0.1; so they are made in float32, from the values that bfloat16 has.

Shapes: B batch, T positions, D width, V padded vocabulary, N chosen positions, numbered through [B, T].
"""

import mlx.core as mx


def scores(
    hidden: mx.array, head: mx.array, places: mx.array, targets: mx.array, vocab: int, top: int
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    """Of targets [N] at `places` [N]: log-probability, whether it is the most probable (of equals the smallest id is), and the ids and
    log-probabilities of the `top` most probable [N, top]. hidden [B, T, D], head [V, D]."""
    logits_NV = logits(hidden, head, places, vocab)
    lse_N = mx.logsumexp(logits_NV, axis=-1)
    target_logit_N = mx.take_along_axis(logits_NV, targets[:, None], axis=-1)[:, 0]
    greedy_N = mx.argmax(logits_NV, axis=-1) == targets
    largest_NK, ids_NK = _largest(logits_NV, top)
    return target_logit_N - lse_N, greedy_N, ids_NK, largest_NK - lse_N[:, None]


def logits(hidden: mx.array, head: mx.array, places: mx.array, vocab: int) -> mx.array:
    """float32 [N, vocab]."""
    x_ND = hidden.reshape(-1, hidden.shape[-1])[places]
    return x_ND.astype(mx.float32) @ head[:vocab].astype(x_ND.dtype).astype(mx.float32).T


def _largest(logits_NV: mx.array, top: int) -> tuple[mx.array, mx.array]:
    """The `top` largest of each row, falling, and their ids: one after another, since MLX's sorts promise no order of equals."""
    values, ids, every_V = [], [], mx.arange(logits_NV.shape[1])
    for _ in range(top):
        id_N1 = mx.argmax(logits_NV, axis=-1, keepdims=True).astype(mx.int32)
        values.append(mx.take_along_axis(logits_NV, id_N1, axis=-1))
        ids.append(id_N1)
        logits_NV = mx.where(every_V == id_N1, -mx.inf, logits_NV)
    if not top:
        return mx.zeros((len(logits_NV), 0)), mx.zeros((len(logits_NV), 0), mx.int32)
    return mx.concatenate(values, axis=-1), mx.concatenate(ids, axis=-1)
