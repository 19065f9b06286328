"""Drawing tokens on the device as the host does (smedjan_common.inference.sampling), in float32; where rounding could matter, it says so.

What must hold for a token to be taken, and why it is then the host's: smedjan_common.inference.drawing.

Shapes: R rows, V vocabulary.
"""

import jax
import jax.numpy as jnp

from smedjan_common.inference.drawing import KEY, MASS, SCORE, TRIES, Settings, Way


def draw(logits: jax.Array, noise: jax.Array, settings: Settings, seen: jax.Array, way: Way) -> tuple[jax.Array, jax.Array]:
    """The next token of each row, int32 [R], and whether it is surely the host's. logits, and noise where a row is not greedy: float32
    [R, V]; seen: which tokens the text has, bool [R, V], for the repetition penalty."""
    scores, blur = logits, jnp.zeros_like(logits[:, 0])  # blur: how far a score may be off, as a share of its size
    if way.penalized:
        penalty = settings.penalty[:, None]
        scores = jnp.where(seen, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)
        blur = jnp.where(settings.penalty == 1, 0.0, SCORE)
    best = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    largest = jnp.max(scores, axis=-1)
    chosen, sure = best, (blur == 0) | (largest - _next(scores, best) > blur * jnp.abs(largest))
    if way.random:
        scores = scores / settings.temperature[:, None]
        keys = scores + noise
        drawn, drawn_sure = _filtered(scores, keys, settings, blur, way) if way.filtered else _best(keys)
        chosen, sure = jnp.where(settings.greedy, best, drawn), jnp.where(settings.greedy, sure, drawn_sure)
    return chosen, sure & jnp.isfinite(largest)


def _filtered(scores: jax.Array, keys: jax.Array, settings: Settings, blur: jax.Array, way: Way) -> tuple[jax.Array, jax.Array]:
    """The first in order of the keys that top-k, top-p and min-p let through."""
    top = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - top[:, None])
    total = _total_of_k(scores, weights, settings.top_k) if way.renormalized else jnp.sum(weights, axis=-1)
    number = jnp.arange(scores.shape[1])
    chosen, sure, open_ = jnp.zeros_like(settings.top_k), jnp.zeros_like(settings.greedy), jnp.ones_like(settings.greedy)
    for _ in range(TRIES):
        best, clear = _best(keys)
        score = jnp.take_along_axis(scores, best[:, None], axis=-1)
        spread = (blur * jnp.abs(score[:, 0]))[:, None]
        before = (scores > score + spread) | ((scores == score) & (number < best[:, None]) & (spread == 0))
        perhaps = jnp.where(spread > 0, (scores >= score - spread) & (number != best[:, None]), before)
        least, most = (jnp.sum(each, axis=-1) for each in (before, perhaps))
        inside, outside = most < settings.top_k, least >= settings.top_k
        least_mass, most_mass = (jnp.sum(jnp.where(each, weights, 0.0), axis=-1) / total for each in (before, perhaps))
        inside &= (most == 0) | (most_mass < settings.top_p - MASS)
        outside |= (least > 0) & (least_mass >= settings.top_p + MASS)
        behind, doubt = score[:, 0] - top, KEY * (16 + jnp.abs(score[:, 0]) + jnp.abs(top))
        inside &= (most == 0) | (behind > settings.min_p + doubt)
        outside |= behind < settings.min_p - doubt
        chosen = jnp.where(open_, best, chosen)
        sure = jnp.where(open_, inside & clear & ~outside, sure)
        open_ &= outside
        keys = jnp.where(before, keys, -jnp.inf)  # only where this one is outside there is a next try
    return chosen, sure & ~open_


def _best(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest key's token, and whether it is clearly the largest."""
    best = jnp.argmax(keys, axis=-1).astype(jnp.int32)
    first, second = jnp.max(keys, axis=-1), _next(keys, best)
    sizes = jnp.abs(first) + jnp.where(jnp.isfinite(second), jnp.abs(second), 0.0)
    return best, first - second > KEY * (64 + sizes)


def _next(values: jax.Array, best: jax.Array) -> jax.Array:
    """The largest but for the best."""
    return jnp.max(jnp.where(jnp.arange(values.shape[1]) == best[:, None], -jnp.inf, values), axis=-1)


def _total_of_k(scores: jax.Array, weights: jax.Array, k: jax.Array) -> jax.Array:
    """The sum of the k largest weights. The k-th score is found bit by bit: as integers, floats are in order."""
    raw = jax.lax.bitcast_convert_type(scores, jnp.uint32)
    order = jnp.where(raw >> 31, ~raw, raw | jnp.uint32(1 << 31))

    def bit(step: jax.Array, found: jax.Array) -> jax.Array:
        wider = found | (jnp.uint32(1 << 31) >> step.astype(jnp.uint32))
        return jnp.where(jnp.sum(order >= wider[:, None], axis=-1) >= k, wider, found)

    kth = jax.lax.fori_loop(0, 32, bit, jnp.zeros(len(k), jnp.uint32))
    over = order > kth[:, None]
    of_kth = jnp.max(jnp.where(order == kth[:, None], weights, 0.0), axis=-1)  # of as many as there is room for, ties cut
    return jnp.sum(jnp.where(over, weights, 0.0), axis=-1) + (k - jnp.sum(over, axis=-1)) * of_kth
