"""Causal depthwise convolution over the positions, with which recurrent mixers blend each input with the few before it.

    y_t = bias + sum_j weight[:, j] x_{t - W + 1 + j}        j = 0 … W - 1

Shifted and added: for so few taps that is faster than a convolution, and both backends get the same values. Before the
first position stands the window, the last W - 1 inputs of what was seen earlier, or nothing (zeros).

Shapes: B batch, T positions, C channels, W taps.
"""

import mlx.core as mx


def causal_conv(
    x: mx.array, weight: mx.array, bias: mx.array | None = None, window: mx.array | None = None, documents: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """x [B, T, C] convolved with weight [C, W] plus bias [C], in the dtype of x (summed in float32), and the next window [B, W - 1, C].

    documents: [B, T], the document of each position, never falling along a row; taps do not reach into an earlier one. A
    window that is given continues the first position's document.
    """
    (_, T, _), W = x.shape, weight.shape[1]
    padded = mx.pad(x, [(0, 0), (W - 1, 0), (0, 0)]) if window is None else mx.concatenate([window.astype(x.dtype), x], axis=1)
    owner = None if documents is None else mx.pad(documents, [(0, 0), (W - 1, 0)], mode="edge")
    y = mx.array(0.0) if bias is None else bias.astype(mx.float32)
    for tap in range(W):
        shifted = padded[:, tap : tap + T].astype(mx.float32)
        if owner is not None and tap < W - 1:
            shifted = mx.where((owner[:, tap : tap + T] == documents)[..., None], shifted, 0.0)
        y = y + shifted * weight[:, tap].astype(mx.float32)
    last = padded[:, T:]
    if owner is not None:
        last = mx.where((owner[:, T:] == owner[:, -1:])[..., None], last, 0)
    return y.astype(x.dtype), last
