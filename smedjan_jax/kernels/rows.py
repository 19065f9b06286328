"""What mixers do to each row of features by itself (norms, gates, rates), as one kernel each way.

A function of tiles [R, F] and of parameters [F] is all that is needed: forward the kernel calls it, backward it differentiates it, inside
of the kernel, from the arguments alone. So every array is read once and every result written once, where XLA makes a pass of its own for
each reduction over rows. Gradients of parameters are added up in the program, then over programs, always in the same order.

Shapes: N rows (positions), H heads or other parts of the features that do not meet, F features of each; R rows of a tile.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from smedjan_jax.kernels.special import rsqrt, silu
from smedjan_jax.kernels.tiles import FLOAT32, Launch, call, padded, partial, power_of_two

Arrays = tuple[jax.Array, ...]


class Plan(NamedTuple):
    """How a problem is run: numbers of a tile, tiles that one program takes, one after the other."""

    values: int = 1024
    tiles: int = 8
    forward: Launch = Launch(4, 1)
    backward: Launch = Launch(4, 1)


def rowwise(
    function: Callable[..., Arrays],
    arrays: Arrays,
    parameters: Arrays,
    dtypes: tuple[Any, ...],
    plan: Plan | None = None,
    through: int | None = None,
) -> Arrays:
    """`function` over each row of `arrays`, a result [..., H, F] for each of `dtypes`.

    arrays [..., H, F], the first one, or [..., H], a number of each row; parameters [H, F] float32. function(arrays [R, F] or [R] float32,
    parameters [F] float32, valid [F] bool) gives float32 arrays [R, F]; it may reduce over features, which are filled up with zeros to a
    power of two, where `valid` is False. through: which of the arrays comes back as one more result, for those who need it later: what they
    give for its gradient is added inside of the kernel.
    """
    *lead, H, F = arrays[0].shape
    wide, N = power_of_two(F), arrays[0].size // (H * F)
    plan = plan or Plan()
    program = max(1, plan.values // wide) * plan.tiles
    size = program * -(-N // program)
    tiles = tuple(padded(padded(x.reshape(N, H, F), -1, wide) if x.ndim > len(lead) + 1 else x.reshape(N, H), 0, size) for x in arrays)
    small = tuple(padded(p.astype(FLOAT32).reshape(H, F), -1, wide) for p in parameters)
    results = _rows(tiles, small, function, tuple(dtypes), F, plan, through)
    return tuple(x[:N, :, :F].reshape(*lead, H, F) for x in results)


def gated_norm(o: jax.Array, gate: jax.Array, weight: jax.Array, eps: float, plan: Plan | None = None) -> jax.Array:
    """rms_norm(o) * weight * silu(gate) over the last axis, in the dtype of gate: o and gate [..., H, F], weight [F] or [H, F]."""
    H, F = o.shape[-2:]

    def function(tiles, parameters, valid):
        o, gate = tiles
        normed = o * rsqrt(jnp.sum(o * o, axis=1, keepdims=True) / F + eps)
        return (normed * parameters[0][None, :] * silu(gate),)

    return rowwise(function, (o, gate), (jnp.broadcast_to(weight, (H, F)),), (gate.dtype,), plan)[0]


def _outputs(tiles, parameters, function, dtypes, F, plan, through):
    (N, H, wide), R = tiles[0].shape, _rows_of(tiles[0], plan)
    program = R * plan.tiles
    specs = [_block(program, x) for x in tiles] + [_whole(wide)] * len(parameters)
    kernel = partial(_forward_kernel, function=function, counts=(len(tiles), len(parameters)), F=F, R=R, steps=plan.tiles)
    outputs = [((N, H, wide), dtype, _block(program, tiles[0])) for dtype in dtypes]
    results = call(kernel, plan.forward, (1, H, N // program), [*tiles, *parameters], specs, outputs, together=True)
    return (*results, *([] if through is None else [tiles[through]]))


def _forward(tiles, parameters, function, dtypes, F, plan, through):
    return _outputs(tiles, parameters, function, dtypes, F, plan, through), (tiles, parameters)


def _backward(function, dtypes, F, plan, through, saved, cotangents):
    tiles, parameters = saved
    (N, H, wide), R = tiles[0].shape, _rows_of(tiles[0], plan)
    program = R * plan.tiles
    specs = [_block(program, x) for x in tiles] + [_whole(wide)] * len(parameters) + [_block(program, tiles[0])] * len(cotangents)
    counts = len(tiles), len(parameters), len(cotangents)
    kernel = partial(_backward_kernel, function=function, counts=counts, F=F, R=R, steps=plan.tiles, through=through)
    outputs = [(x.shape, x.dtype, _block(program, x)) for x in tiles]
    outputs += [((N // program, H, wide), FLOAT32, pl.BlockSpec((None, None, wide), lambda _, h, i: (i, h, 0)))] * len(parameters)
    found = call(kernel, plan.backward, (1, H, N // program), [*tiles, *parameters, *cotangents], specs, outputs, together=True)
    return tuple(found[: len(tiles)]), tuple(jnp.sum(x, axis=0) for x in found[len(tiles) :])


_rows: Any = jax.custom_vjp(_outputs, nondiff_argnums=(2, 3, 4, 5, 6))
_rows.defvjp(_forward, _backward)


def _rows_of(tile: jax.Array, plan: Plan) -> int:
    return max(1, plan.values // tile.shape[-1])


def _block(rows: int, x: jax.Array) -> pl.BlockSpec:
    if x.ndim == 2:
        return pl.BlockSpec((rows, None), lambda _, h, i: (i, h))
    return pl.BlockSpec((rows, None, x.shape[-1]), lambda _, h, i: (i, h, 0))


def _whole(features: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, features), lambda _, h, i: (h, 0))


def _forward_kernel(*refs, function, counts, F, R, steps):
    tiles, parameters, outputs = _split(refs, counts)
    valid, fixed = lax.broadcasted_iota(jnp.int32, (outputs[0].shape[-1],), 0) < F, [p[...] for p in parameters]

    def body(i, read):
        ahead, at = _read(tiles, i + 1, R, steps), pl.ds(i * R, R)
        results = function([x.astype(FLOAT32) for x in read], fixed, valid)
        for out, result in zip(outputs, results, strict=True):
            out[at, :] = result.astype(out.dtype)
        return ahead

    lax.fori_loop(0, steps, body, _read(tiles, 0, R, steps))


def _read(refs: Any, i: Any, R: int, steps: int) -> list[jax.Array]:
    """Tile i of each, or the last: read while the one before it is being worked on, so that memory is never waited for by all threads."""
    at = pl.ds(jnp.minimum(i, steps - 1) * R, R)
    return [x[at] for x in refs]


def _backward_kernel(*refs, function, counts, F, R, steps, through):
    tiles, parameters, cotangents, outputs = _split(refs, counts)
    valid, fixed = lax.broadcasted_iota(jnp.int32, (outputs[0].shape[-1],), 0) < F, [p[...] for p in parameters]

    def body(i, carried):
        (totals, read), ahead, at = carried, _read([*tiles, *cotangents], i + 1, R, steps), pl.ds(i * R, R)
        _, pull = jax.vjp(lambda xs, ps: function(xs, ps, valid), [x.astype(FLOAT32) for x in read[: len(tiles)]], fixed)
        slopes = [c.astype(FLOAT32) for c in read[len(tiles) :]]
        later = None if through is None else slopes.pop()
        dtiles, dparameters = pull(tuple(slopes))
        if through is not None:
            dtiles[through] = dtiles[through] + later
        for out, gradient in zip(outputs, dtiles, strict=False):
            out[at] = gradient.astype(out.dtype)
        return [total + gradient for total, gradient in zip(totals, dparameters, strict=True)], ahead

    first = [jnp.zeros(p.shape, FLOAT32) for p in fixed], _read([*tiles, *cotangents], 0, R, steps)
    totals, _ = lax.fori_loop(0, steps, body, first)
    for out, total in zip(outputs[len(tiles) :], totals, strict=True):
        out[...] = total


def _split(refs: Any, counts: tuple[int, ...]) -> list[Any]:
    parts, start = [], 0
    for count in counts:
        parts.append(refs[start : start + count])
        start += count
    return [*parts, refs[start:]]
