"""Causal depthwise convolution and SiLU of mixers/conv.py as one kernel each way, and the unit length of heads where a mixer wants it.

    u_t = bias + sum_j weight[:, j] x_{t - W + 1 + j};   s = silu(u);   y = s, or scale s / sqrt(|s|^2 + eps) over a head

The features come as they are projected and leave as the arrays that the core reads, one for each part, so nothing is cut or joined
outside. Backward u is made again from x: one kernel makes d u, which the next one convolves with the taps turned round. The gradients of
taps and bias are added up tile by tile, then over tiles.

Shapes: B batch, T positions, H heads of F features (any equal parts of the channels), W taps; R positions of a tile.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from smedjan_jax.kernels.tiles import FLOAT32, Launch, call, padded, partial, power_of_two

EPS = 1e-6


class Part(NamedTuple):
    """Neighbouring heads that become one array. scale: the length that each gets; 0: its own."""

    heads: int
    scale: float = 0.0


class Plan(NamedTuple):
    """How a problem is run: positions of a tile."""

    rows: int = 64
    forward: Launch = Launch(4, 1)
    slope: Launch = Launch(4, 1)
    backward: Launch = Launch(4, 1)


def conv_silu(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    documents: jax.Array | None,
    parts: tuple[Part, ...],
    plan: Plan | None = None,
) -> tuple[jax.Array, ...]:
    """For each part [B, T, heads, F] in the dtype of x [B, T, C]; C = F times all heads. weight [C, W], bias [C] float32.

    documents: int32 [B, T]; taps do not reach into an earlier one.
    """
    (B, T, C), H, W, plan = x.shape, sum(part.heads for part in parts), weight.shape[1], plan or Plan()
    F = C // H
    wide, size = power_of_two(F), plan.rows * -(-T // plan.rows)
    x = padded(padded(x.reshape(B, T, H, F), -1, wide), 1, size)
    taps = padded(weight.astype(FLOAT32).T.reshape(W, H, F), -1, wide)
    start = jnp.zeros((H, F), FLOAT32) if bias is None else bias.astype(FLOAT32).reshape(H, F)
    docs = None if documents is None else jnp.pad(documents.astype(jnp.int32), ((0, 0), (0, size - T)), mode="edge")
    return tuple(y[:, :T, :, :F] for y in _conv(x, taps, padded(start, -1, wide), docs, parts, plan))


def _outputs(x, taps, bias, docs, parts, plan):
    B, T, H, F = x.shape
    outputs = [((B, T, part.heads, F), x.dtype, _of_part(parts, i, plan.rows, F)) for i, part in enumerate(parts)]
    kernel = partial(_forward_kernel, parts=parts, R=plan.rows, masked=docs is not None)
    inputs, specs = _inputs(x, taps, bias, docs)
    return tuple(call(kernel, plan.forward, (B, H, T // plan.rows), inputs, specs, outputs))


def _forward(x, taps, bias, docs, parts, plan):
    return _outputs(x, taps, bias, docs, parts, plan), (x, taps, bias, docs)


def _backward(parts, plan, saved, cotangents):
    x, taps, bias, docs = saved
    (B, T, H, F), W, R = x.shape, taps.shape[0], plan.rows
    inputs, specs = _inputs(x, taps, bias, docs)
    own = [_of_part(parts, i, R, F) for i in range(len(parts))]
    tile = pl.BlockSpec((None, R, None, F), lambda b, h, i: (b, i, h, 0))
    outputs = [
        (x.shape, x.dtype, tile),
        ((B, T // R, W + 1, H, F), FLOAT32, pl.BlockSpec((None, None, W + 1, None, F), lambda b, h, i: (b, i, 0, h, 0))),
    ]
    kernel = partial(_slope_kernel, parts=parts, R=R, masked=docs is not None)
    du, sums = call(kernel, plan.slope, (B, H, T // R), [*inputs, *cotangents], [*specs, *own], outputs)
    inputs, specs = _inputs(du, taps, bias, docs)
    kernel = partial(_backward_kernel, R=R, masked=docs is not None)
    dx = call(kernel, plan.backward, (B, H, T // R), inputs, specs, [(x.shape, x.dtype, tile)])[0]
    sums = jnp.sum(sums, axis=(0, 1))
    return dx, sums[:W], sums[W], None


_conv: Any = jax.custom_vjp(_outputs, nondiff_argnums=(4, 5))
_conv.defvjp(_forward, _backward)


def _inputs(x, taps, bias, docs):
    _, T, _, F = x.shape
    numbers = jnp.zeros((1, 1), jnp.int32) if docs is None else docs
    of_row = pl.BlockSpec((1, 1), lambda b, h, i: (0, 0)) if docs is None else pl.BlockSpec((None, T), lambda b, h, i: (b, 0))
    specs = [
        pl.BlockSpec((None, T, None, F), lambda b, h, i: (b, 0, h, 0)),
        pl.BlockSpec((taps.shape[0], None, F), lambda b, h, i: (0, h, 0)),
        pl.BlockSpec((None, F), lambda b, h, i: (h, 0)),
        of_row,
    ]
    return [x, taps, bias, numbers], specs


def _bounds(parts: tuple[Part, ...]) -> list[tuple[int, int]]:
    """The heads of each part, from and to."""
    ends = [sum(part.heads for part in parts[: i + 1]) for i in range(len(parts))]
    return [(end - part.heads, end) for end, part in zip(ends, parts, strict=True)]


def _of_part(parts: tuple[Part, ...], number: int, rows: int, F: int) -> pl.BlockSpec:
    """A part's array [B, T, heads, F] for programs of any head: those of other parts stand at its border and leave it alone."""
    first, end = _bounds(parts)[number]
    return pl.BlockSpec((None, rows, None, F), lambda b, h, i: (b, i, jnp.clip(h - first, 0, end - first - 1), 0))


def near(x: Any, documents: Any, at: jax.Array, offset: int, masked: bool) -> jax.Array:
    """The rows `at` + offset of a sequence [T, F], float32; 0 where there is none, or one of another document."""
    row = at + offset
    inside = (row >= 0) if offset < 0 else (row < x.shape[0])
    near = jnp.clip(row, 0, x.shape[0] - 1)
    if masked:
        inside = inside & (documents[near] == documents[at])
    return jnp.where(inside[:, None], x[near, :].astype(FLOAT32), 0.0)


def _convolved(x, taps, bias, documents, at, masked):
    """The inputs of the taps, and u, of the rows `at`."""
    W = taps.shape[0]
    inputs = [near(x, documents, at, tap - W + 1, masked) if tap < W - 1 else x[at, :].astype(FLOAT32) for tap in range(W)]
    return inputs, sum((each * taps[tap, :][None, :] for tap, each in enumerate(inputs)), bias[...][None, :])


def _forward_kernel(x, taps, bias, documents, *outputs, parts, R, masked):
    h, start = pl.program_id(1), pl.program_id(2) * R
    _, u = _convolved(x, taps, bias, documents, start + lax.iota(jnp.int32, R), masked)
    active = u * jax.nn.sigmoid(u)
    for out, part, (first, end) in zip(outputs, parts, _bounds(parts), strict=True):

        @pl.when((h >= first) & (h < end))
        def _store(out=out, part=part):
            y = active
            if part.scale:
                y = active * (part.scale * lax.rsqrt(jnp.sum(active * active, axis=1, keepdims=True) + EPS))
            out[...] = y.astype(out.dtype)


def _slope_kernel(x, taps, bias, documents, *refs, parts, R, masked):
    """d u, and this tile's sums for the gradients of taps and bias."""
    *cotangents, du, totals = refs
    h, W = pl.program_id(1), taps.shape[0]
    at = pl.program_id(2) * R + lax.iota(jnp.int32, R)
    _, u = _convolved(x, taps, bias, documents, at, masked)
    gate = jax.nn.sigmoid(u)
    slope = gate * (1 + u * (1 - gate))
    for dy, part, (first, end) in zip(cotangents, parts, _bounds(parts), strict=True):

        @pl.when((h >= first) & (h < end))
        def _store(dy=dy, part=part):
            own = dy[...].astype(FLOAT32)
            if part.scale:
                active = u * gate
                length = lax.rsqrt(jnp.sum(active * active, axis=1, keepdims=True) + EPS)
                own = part.scale * length * (own - active * (length * length * jnp.sum(active * own, axis=1, keepdims=True)))
            own = own * slope
            du[...] = own.astype(du.dtype)
            for tap in range(W):  # loaded again: they are near, and registers are few
                row = near(x, documents, at, tap - W + 1, masked) if tap < W - 1 else x[at, :].astype(FLOAT32)
                totals[tap, :] = jnp.sum(own * row, axis=0)
            totals[W, :] = jnp.sum(own, axis=0)


def _backward_kernel(du, taps, bias, documents, dx, *, R, masked):
    """The output `ahead` positions later has this input at its tap W - 1 - ahead."""
    at, W = pl.program_id(2) * R + lax.iota(jnp.int32, R), taps.shape[0]
    total = du[at, :].astype(FLOAT32) * taps[W - 1, :][None, :]
    for ahead in range(1, W):
        total = total + near(du, documents, at, ahead, masked) * taps[W - 1 - ahead, :][None, :]
    dx[...] = total.astype(dx.dtype)
