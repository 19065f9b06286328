"""Drawing tokens on the device as the host does (smedjan_common.inference.sampling), in float32; where rounding could matter, it says so.

What must hold for a token to be taken, and why it is then the host's: smedjan_common.inference.drawing.

Shapes: R rows, V vocabulary.
"""

import mlx.core as mx

from smedjan_common.inference.drawing import KEY, MASS, SCORE, TRIES, Settings, Way


def draw(logits: mx.array, noise: mx.array, settings: Settings, seen: mx.array, way: Way) -> tuple[mx.array, mx.array]:
    """The next token of each row, int32 [R], and whether it is surely the host's. logits, and noise where a row is not greedy: float32
    [R, V]; seen: which tokens the text has, bool [R, V], for the repetition penalty."""
    scores, blur = logits, mx.zeros_like(logits[:, 0])  # blur: how far a score may be off, as a share of its size
    if way.penalized:
        penalty = settings.penalty[:, None]
        scores = mx.where(seen, mx.where(scores > 0, scores / penalty, scores * penalty), scores)
        blur = mx.where(settings.penalty == 1, 0.0, SCORE)
    best = mx.argmax(scores, axis=-1).astype(mx.int32)
    largest = mx.max(scores, axis=-1)
    chosen, sure = best, (blur == 0) | (largest - _next(scores, best) > blur * mx.abs(largest))
    if way.random:
        scores = scores / settings.temperature[:, None]
        keys = scores + noise
        drawn, drawn_sure = _filtered(scores, keys, settings, blur, way) if way.filtered else _best(keys)
        chosen, sure = mx.where(settings.greedy, best, drawn), mx.where(settings.greedy, sure, drawn_sure)
    return chosen, sure & mx.isfinite(largest)


def _filtered(scores: mx.array, keys: mx.array, settings: Settings, blur: mx.array, way: Way) -> tuple[mx.array, mx.array]:
    """The first in order of the keys that top-k, top-p and min-p let through."""
    top = mx.max(scores, axis=-1)
    weights = mx.exp(scores - top[:, None])
    total = _total_of_k(scores, weights, settings.top_k) if way.renormalized else mx.sum(weights, axis=-1)
    number = mx.arange(scores.shape[1])
    chosen, sure, open_ = mx.zeros_like(settings.top_k), mx.zeros_like(settings.greedy), mx.ones_like(settings.greedy)
    for _ in range(TRIES):
        best, clear = _best(keys)
        score = mx.take_along_axis(scores, best[:, None], axis=-1)
        spread = (blur * mx.abs(score[:, 0]))[:, None]
        before = (scores > score + spread) | ((scores == score) & (number < best[:, None]) & (spread == 0))
        perhaps = mx.where(spread > 0, (scores >= score - spread) & (number != best[:, None]), before)
        least, most = (mx.sum(each, axis=-1) for each in (before, perhaps))
        inside, outside = most < settings.top_k, least >= settings.top_k
        least_mass, most_mass = (mx.sum(mx.where(each, weights, 0.0), axis=-1) / total for each in (before, perhaps))
        inside &= (most == 0) | (most_mass < settings.top_p - MASS)
        outside |= (least > 0) & (least_mass >= settings.top_p + MASS)
        behind, doubt = score[:, 0] - top, KEY * (16 + mx.abs(score[:, 0]) + mx.abs(top))
        inside &= (most == 0) | (behind > settings.min_p + doubt)
        outside |= behind < settings.min_p - doubt
        chosen = mx.where(open_, best, chosen)
        sure = mx.where(open_, inside & clear & ~outside, sure)
        open_ &= outside
        keys = mx.where(before, keys, -mx.inf)  # only where this one is outside there is a next try
    return chosen, sure & ~open_


def _best(keys: mx.array) -> tuple[mx.array, mx.array]:
    """The largest key's token, and whether it is clearly the largest."""
    best = mx.argmax(keys, axis=-1).astype(mx.int32)
    first, second = mx.max(keys, axis=-1), _next(keys, best)
    sizes = mx.abs(first) + mx.where(mx.isfinite(second), mx.abs(second), 0.0)
    return best, first - second > KEY * (64 + sizes)


def _next(values: mx.array, best: mx.array) -> mx.array:
    """The largest but for the best."""
    return mx.max(mx.where(mx.arange(values.shape[1]) == best[:, None], -mx.inf, values), axis=-1)


def _total_of_k(scores: mx.array, weights: mx.array, k: mx.array) -> mx.array:
    """The sum of the k largest weights. The k-th score is found bit by bit: as integers, floats are in order."""
    raw = mx.view(scores, mx.uint32)
    order = mx.where((raw >> 31) > 0, raw ^ mx.array(0xFFFFFFFF, mx.uint32), raw | mx.array(1 << 31, mx.uint32))

    kth = mx.zeros(len(k), mx.uint32)
    for step in range(32):
        wider = kth | mx.array(1 << (31 - step), mx.uint32)
        kth = mx.where(mx.sum(order >= wider[:, None], axis=-1) >= k, wider, kth)
    over = order > kth[:, None]
    of_kth = mx.max(mx.where(order == kth[:, None], weights, 0.0), axis=-1)  # of as many as there is room for, ties cut
    return mx.sum(mx.where(over, weights, 0.0), axis=-1) + (k - mx.sum(over, axis=-1)) * of_kth
