"""What the sweeps of scalar_decay.py share with its other backward pass, and that pass: of many values that share a query and a key.

Mamba-2 brings a step for each value, which scales it, and a skip for each head, which adds the value itself to the output; both are done
inside of the kernels.

Shapes: as in scalar_decay.py.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from smedjan_jax.kernels.tiles import (
    FLOAT32,
    Launch,
    borders_at,
    call,
    chunk_specs,
    decays,
    dot,
    numbers,
    of_chunks,
    of_head,
    partial,
    row_sums,
    walk,
    walk_vector,
    whole_specs,
)

PART = 64  # of the features of shared keys, for a program that adds up over values


class Scale(NamedTuple):
    """Values become step * value, and skip * value is added to the outputs, float32."""

    step: jax.Array  # [B, T, G, R]
    skip: jax.Array  # [G, R]


class Plan(NamedTuple):
    """How a problem is run. segments 0: as many as fill the GPU."""

    chunk: int = 64
    segments: int = 0
    forward: Launch = Launch(4, 2)
    backward: Launch = Launch(4, 2)
    values: Launch = Launch(4, 2)
    pieces: Launch = Launch(4, 3)


def documents_or_none(docs: Any) -> tuple[tuple[jax.Array, jax.Array], bool]:
    """Documents as a kernel takes them, and whether there are any."""
    return (numbers(None, None, 0, 1), False) if docs is None else (docs, True)


def scale_inputs(scale: Scale | None, T: int) -> tuple[list[jax.Array], list[pl.BlockSpec], bool]:
    """Inputs of a kernel whose programs walk, their specs, and whether they say anything."""
    if scale is None:
        return [jnp.zeros((1, 1), FLOAT32)] * 2, [pl.BlockSpec((1, 1), lambda *_: (0, 0))] * 2, False
    return list(scale), [walk_vector(T), pl.BlockSpec((None, 1), lambda b, h: (h, 0))], True


def scaled_values(value: jax.Array, step: Any, at: Any, scaled: bool) -> jax.Array:
    """step * value [C, V] of the positions `at`."""
    return (value * step[at][:, None]).astype(value.dtype) if scaled else value


def heads_of(T: int, features: int, heads: int, programs: int) -> pl.BlockSpec:
    """[B, T, heads, features]: the heads of a program, several or one that other programs read too."""
    if heads < programs:
        return pl.BlockSpec((None, T, 1, features), lambda b, h: (b, 0, h // (programs // heads), 0))
    return pl.BlockSpec((None, T, heads // programs, features), lambda b, h: (b, 0, h, 0))


def scale_outputs(scaled: bool, B: int, T: int, H: int) -> list[Any]:
    """Outputs for the gradients of step, and of skip for each row."""
    one = pl.BlockSpec((None, None, 1), lambda b, h: (b, h, 0))
    return [((B, T, H), FLOAT32, walk_vector(T)), ((B, H, 1), FLOAT32, one)] if scaled else []


def unscaled(dvalue, value, out, step, skip, dstep, at, dskip):
    """d of the values before they are scaled, and what d of the skip is so far; d of the step is stored."""
    dstep[at] = row_sums(value, dvalue)
    return dvalue * step[:, None] + skip * out, dskip + jnp.sum(row_sums(value, out.astype(FLOAT32)))


def shared_back(q, k, v, total, scale, states, do, dlast, docs: Any, plan: Plan) -> Any:
    """What `_sweep_back` of scalar_decay.py gives, for R values that share a query and a key: a sweep back makes d v and leaves the
    gradients of the states; then programs of a chunk and a part of K add the gradients of q and k up over the values, in registers."""
    (B, T, G, K), (H, V), C = q.shape, v.shape[2:], plan.chunk
    docs, masked = documents_or_none(docs)
    n, R, parts = T // C, H // G, max(1, K // PART)
    factors, places, scaled = scale_inputs(scale, T)
    own = [v] if scaled else []
    specs = [heads_of(T, K, G, H), heads_of(T, K, G, H), walk_vector(T), *places, walk(T, V), of_head(K, V), *whole_specs(masked, T, n)]
    specs += [walk(T, V) for _ in own]
    outputs = [(v.shape, v.dtype, walk(T, V)), ((B, H, n, K, V), v.dtype, of_chunks(n, K, V)), ((B, H, K, V), FLOAT32, of_head(K, V))]
    kernel = partial(_values_back_kernel, C=C, n=n, masked=masked, scaled=scaled)
    inputs = [q, k, total, *factors, do, dlast, *docs, *own]
    dv, after, dstate, *dscale = call(kernel, plan.values, (B, H), inputs, specs, [*outputs, *scale_outputs(scaled, B, T, H)])

    narrow = pl.BlockSpec((None, C, None, K // parts), lambda b, h, i: (b, i, h // parts, h % parts))
    several = pl.BlockSpec((None, C, R, V), lambda b, h, i: (b, i, h // parts, 0))
    vector = pl.BlockSpec((None, C, R), lambda b, h, i: (b, i, h // parts))
    matrices = pl.BlockSpec((None, R, None, K // parts, V), lambda b, h, i: (b, h // parts, i, h % parts, 0))
    specs = [narrow, narrow, several, vector, vector if scaled else places[0], matrices, several, matrices, *chunk_specs(masked, C, n)]
    outputs = [
        *((q.shape, q.dtype, narrow), (k.shape, k.dtype, narrow)),
        ((parts, B, T, H), FLOAT32, pl.BlockSpec((None, None, C, R), lambda b, h, i: (h % parts, b, i, h // parts))),
        ((parts, B, H, n, 1), FLOAT32, pl.BlockSpec((None, None, R, None, 1), lambda b, h, i: (h % parts, b, h // parts, i, 0))),
    ]
    kernel = partial(_shared_piece_kernel, C=C, R=R, masked=masked, scaled=scaled)
    inputs = [q, k, v, total, factors[0], states, do, after, *docs]
    dq, dk, change, flow = call(kernel, plan.pieces, (B, G * parts, n), inputs, specs, outputs)
    return dq, dk, dv, jnp.sum(change, axis=0), jnp.sum(flow, axis=0), dstate, *dscale


def _values_back_kernel(q, k, total, step, skip, do, dlast, documents, edges, *refs, C, n, masked, scaled):
    own, (dv, after, dstate, *dscale) = (refs[0], refs[1:]) if scaled else (None, refs)

    def body(m, carried):
        (dS, dskip), i = carried, n - 1 - m
        at = pl.ds(i * C, C)
        query, key, out = q[at, 0, :], k[at, 0, :], do[at, :]
        dtype = out.dtype
        d = decays(total[at], total[i * C + C - 1], borders_at(C, i, documents, edges, masked))
        small = dS.astype(dtype)
        after[i] = small
        inside = (dot(query, key, turn_b=True) * d.between).astype(dtype)
        dvalue = dot(inside, out, turn_a=True) + dot(key, small) * d.end[:, None]
        if own is not None:
            dvalue, dskip = unscaled(dvalue, own[at, :], out, step[at], skip[0], dscale[0], at, dskip)
        dv[at, :] = dvalue.astype(dtype)
        return d.whole * dS + dot(query, (out * d.start[:, None]).astype(dtype), turn_a=True), dskip

    dstate[...], dskip = lax.fori_loop(0, n, body, (dlast[...], jnp.float32(0)))
    if scaled:
        dscale[1][0] = dskip


def _shared_piece_kernel(q, k, v, total, step, states, do, after, documents, edges, dq, dk, change, flow, *, C, R, masked, scaled):
    query, key = q[...], k[...]
    dtype = key.dtype
    b = borders_at(C, pl.program_id(2), documents, edges, masked, whole=False)

    def body(r, sums):
        value, out, S, dS = scaled_values(v[:, r, :], step, (slice(None), r), scaled), do[:, r, :], states[r], after[r]
        d = decays(total[:, r], total[C - 1, r], b)
        slope = (dot(out, value, turn_b=True) * d.between).astype(dtype)
        dquery = dot(slope, key) + dot(out, S, turn_b=True) * d.start[:, None]
        more = row_sums(query, dquery)
        outwards = dot(value, dS, turn_b=True) * d.end[:, None]
        flow[r, 0] = d.whole * jnp.sum(S.astype(FLOAT32) * dS) + jnp.sum(key * outwards)
        dkey = dot(slope, query, turn_a=True) + outwards
        change[:, r] = more - row_sums(key, dkey)
        return sums[0] + dquery, sums[1] + dkey

    zeros = jnp.zeros(query.shape, FLOAT32)
    dquery, dkey = lax.fori_loop(0, R, body, (zeros, zeros))
    dq[...], dk[...] = dquery.astype(dq.dtype), dkey.astype(dk.dtype)
