"""Causal depthwise convolution over the positions, with which recurrent mixers blend each input with the few before it.

    y_t = bias + sum_j weight[:, j] x_{t - W + 1 + j}        j = 0 … W - 1

Shifted and added: for so few taps that is faster than a convolution, and both backends get the same values. Before the
first position stands the window, the last W - 1 inputs of what was seen earlier, or nothing (zeros).

Shapes: B batch, T positions, C channels, W taps.
"""

import jax
import jax.numpy as jnp


def causal_conv(
    x: jax.Array, weight: jax.Array, bias: jax.Array | None = None, window: jax.Array | None = None, documents: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """x [B, T, C] convolved with weight [C, W] plus bias [C], in the dtype of x (summed in float32), and the next window [B, W - 1, C].

    documents: [B, T], the document of each position, never falling along a row; taps do not reach into an earlier one. A
    window that is given continues the first position's document.
    """
    (_, T, _), W = x.shape, weight.shape[1]
    padded = jnp.pad(x, ((0, 0), (W - 1, 0), (0, 0))) if window is None else jnp.concatenate([window.astype(x.dtype), x], axis=1)
    owner = None if documents is None else jnp.pad(documents, ((0, 0), (W - 1, 0)), mode="edge")
    y = jnp.zeros((), jnp.float32) if bias is None else bias.astype(jnp.float32)
    for tap in range(W):
        shifted = padded[:, tap : tap + T].astype(jnp.float32)
        if owner is not None and tap < W - 1:
            shifted = jnp.where((owner[:, tap : tap + T] == documents)[..., None], shifted, 0.0)
        y = y + shifted * weight[:, tap].astype(jnp.float32)
    last = padded[:, T:]
    if owner is not None:
        last = jnp.where((owner[:, T:] == owner[:, -1:])[..., None], last, 0)
    return y.astype(x.dtype), last
