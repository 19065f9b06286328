"""What the sweeps of scalar_decay.py share with those of many values that share a query and a key, and these.

Mamba-2 brings a step for each value, which scales it, and a skip for each head, which adds the value itself to the output; both are done
inside of the kernels: steps in the columns of the products of queries and keys and in what decays a key to the chunk's end, so that
no scaled values are made. Backward, what a chunk leaves to later ones is <value, its gradient> as much as <key, its gradient>, so that
queries and keys are gone through for all values of a chunk together.

Shapes: as in scalar_decay.py; vectors here are [B, H, T], a head's numbers side by side.
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
    bounded_decays,
    call,
    chunk_specs,
    documents_or_none,
    dot,
    edge_decays,
    of_chunks,
    of_head,
    partial,
    row_sums,
    seen_turned,
    walk,
    walk_numbers,
    whole_specs,
)


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
    values: Launch = Launch(4, 1)
    pieces: Launch = Launch(8, 3)


def scale_inputs(scale: Scale | None, vector: pl.BlockSpec) -> tuple[list[jax.Array], list[pl.BlockSpec], bool]:
    """Inputs of a kernel whose programs walk, their specs (`vector`: that of steps), and whether they say anything."""
    if scale is None:
        return [jnp.zeros((1, 1), FLOAT32)] * 2, [pl.BlockSpec((1, 1), lambda *_: (0, 0))] * 2, False
    return list(scale), [vector, pl.BlockSpec((None, 1), lambda b, h: (h, 0))], True


def scaled_values(value: jax.Array, step: Any, at: Any, scaled: bool) -> jax.Array:
    """step * value [C, V] of the positions `at`."""
    return (value * step[at][:, None]).astype(value.dtype) if scaled else value


def heads_of(T: int, features: int, heads: int, programs: int) -> pl.BlockSpec:
    """[B, T, heads, features]: the heads of a program, several or one that other programs read too."""
    if heads < programs:
        return pl.BlockSpec((None, T, 1, features), lambda b, h: (b, 0, h // (programs // heads), 0))
    return pl.BlockSpec((None, T, heads // programs, features), lambda b, h: (b, 0, h, 0))


def scale_outputs(scaled: bool, B: int, H: int, steps: tuple[int, ...], vector: pl.BlockSpec) -> list[Any]:
    """Outputs for the gradients of step, of shape `steps` and spec `vector`, and of skip for each row."""
    one = pl.BlockSpec((None, None, 1), lambda b, h: (b, h, 0))
    return [(steps, FLOAT32, vector), ((B, H, 1), FLOAT32, one)] if scaled else []


def unscaled(dvalue, value, out, step, skip, dstep, at, dskip):
    """d of the values before they are scaled, and what d of the skip is so far; d of the step is stored."""
    dstep[at] = row_sums(value, dvalue)
    return dvalue * step[:, None] + skip * out, dskip + jnp.sum(row_sums(value, out.astype(FLOAT32)))


def shared_sweep(q, k, v, total, scale, state, docs: Any, plan: Plan) -> Any:
    """What `_sweep` of scalar_decay.py gives, for R values that share a query and a key."""
    (B, T, G, K), (H, V), C = q.shape, v.shape[2:], plan.chunk
    docs, masked = documents_or_none(docs)
    scale, n = _turned(scale), T // C
    factors, places, scaled = scale_inputs(scale, _vector(T))
    kernel = partial(_shared_sweep_kernel, C=C, n=n, masked=masked, scaled=scaled)
    specs = [heads_of(T, K, G, H), heads_of(T, K, G, H), walk(T, V), _vector(T), *places, of_head(K, V), *whole_specs(masked, T, n)]
    outputs = [(v.shape, v.dtype, walk(T, V)), ((B, H, n, K, V), v.dtype, of_chunks(n, K, V)), ((B, H, K, V), FLOAT32, of_head(K, V))]
    return call(kernel, plan.forward, (B, H), [q, k, v, total.swapaxes(1, 2), *factors, state, *docs], specs, outputs)


def _turned(scale: Scale | None) -> Scale | None:
    """Steps [B, H, T]."""
    return scale and scale._replace(step=scale.step.swapaxes(1, 2))


def _vector(T: int) -> pl.BlockSpec:
    """[B, H, T], for programs that walk."""
    return pl.BlockSpec((None, None, T), lambda b, h: (b, h, 0))


def _shared_sweep_kernel(q, k, v, total, step, skip, state, documents, edges, o, states, last, *, C, n, masked, scaled):
    def body(i, S):
        at = pl.ds(i * C, C)
        query, key, own, here = q[at, 0, :], k[at, 0, :], v[at, :], total[at]
        dtype = own.dtype
        b = borders_at(C, i, documents, edges, masked)
        start, end, whole = edge_decays(here, total[i * C + C - 1], b)
        between = bounded_decays(here)
        if scaled:
            between, end = between * step[at][None, :], end * step[at]
        small = S.astype(dtype)
        states[i] = small
        scores = jnp.where(b.seen, dot(query, key, turn_b=True), 0.0)
        out = dot(query, small) * start[:, None] + dot((scores * between).astype(dtype), own)
        o[at, :] = (out + skip[0] * own if scaled else out).astype(o.dtype)
        return whole * S + dot(key, (own * end[:, None]).astype(dtype), turn_a=True)

    last[...] = lax.fori_loop(0, n, body, state[...])


def shared_back(q, k, v, total, scale, states, do, dlast, docs: Any, plan: Plan) -> Any:
    """What `_sweep_back` of scalar_decay.py gives, for R values that share a query and a key: a sweep back makes the gradients of values
    and leaves those of the states; then programs of a chunk go through its values and add the gradients of q and k up in registers.

    Inside a chunk these are products with the sum of all slopes: one for each chunk, not one for each value.
    """
    (B, T, G, K), (H, V), C = q.shape, v.shape[2:], plan.chunk
    docs, masked = documents_or_none(docs)
    total, scale, n, R = total.swapaxes(1, 2), _turned(scale), T // C, H // G
    factors, places, scaled = scale_inputs(scale, _vector(T))
    specs = [heads_of(T, K, G, H), heads_of(T, K, G, H), walk(T, V), _vector(T), *places, walk(T, V), of_head(K, V)]
    outputs = [(v.shape, v.dtype, walk(T, V)), ((B, H, n, K, V), v.dtype, of_chunks(n, K, V)), ((B, H, T), FLOAT32, _vector(T))]
    outputs += [((B, H, n, 1), FLOAT32, walk_numbers(n)), ((B, H, K, V), FLOAT32, of_head(K, V))]
    outputs += scale_outputs(scaled, B, H, (B, H, T), _vector(T))
    kernel = partial(_values_back_kernel, C=C, n=n, masked=masked, scaled=scaled)
    inputs = [q, k, v, total, *factors, do, dlast, *docs]
    found = call(kernel, plan.values, (B, H), inputs, [*specs, *whole_specs(masked, T, n)], outputs)
    dv, after, less, leaves, dstate, *dscale = found
    if scaled:
        dscale[0] = dscale[0].swapaxes(1, 2)

    shared = pl.BlockSpec((None, C, None, K), lambda b, g, i: (b, i, g, 0))
    several = pl.BlockSpec((None, C, R, V), lambda b, g, i: (b, i, g, 0))
    vectors = pl.BlockSpec((None, R, C), lambda b, g, i: (b, g, i))
    matrices = pl.BlockSpec((None, R, None, K, V), lambda b, g, i: (b, g, i, 0, 0))
    specs = [shared, shared, several, vectors, vectors if scaled else places[0], matrices, several, matrices, *chunk_specs(masked, C, n)]
    outputs = [
        *((q.shape, q.dtype, shared), (k.shape, k.dtype, shared)),
        ((B, H, T), FLOAT32, vectors),
        ((B, H, n, 1), FLOAT32, pl.BlockSpec((None, R, None, 1), lambda b, g, i: (b, g, i, 0))),
    ]
    kernel = partial(_shared_pieces_kernel, C=C, R=R, masked=masked, scaled=scaled)
    inputs = [q, k, v, total, factors[0], states, do, after, *docs]
    dq, dk, more, kept = call(kernel, plan.pieces, (B, G, n), inputs, specs, outputs)
    return dq, dk, dv, (more - less).swapaxes(1, 2), kept + leaves, dstate, *dscale


def _values_back_kernel(q, k, v, total, step, skip, do, dlast, documents, edges, *outputs, C, n, masked, scaled):
    dv, after, less, leaves, dstate, *dscale = outputs

    def body(m, carried):
        (dS, dskip), i = carried, n - 1 - m
        at = pl.ds(i * C, C)
        query, key, own, out = q[at, 0, :], k[at, 0, :], v[at, :], do[at, :]
        dtype = out.dtype
        here = total[at]
        b = borders_at(C, i, documents, edges, masked)
        start, end, whole = edge_decays(here, total[i * C + C - 1], b)
        small = dS.astype(dtype)
        after[i] = small
        # of keys and queries: the values are the rows
        inside = (jnp.where(seen_turned(b, C), dot(key, query, turn_b=True), 0.0) * bounded_decays(here, turn=True)).astype(dtype)
        through = dot(key, small) * end[:, None]
        dvalue = through + dot(inside, out)
        leaving = row_sums(own, through)
        if scaled:
            rate = step[at]
            dscale[0][at] = row_sums(own, dvalue)
            dskip = dskip + jnp.sum(row_sums(own, out.astype(FLOAT32)))
            leaving, dvalue = leaving * rate, dvalue * rate[:, None] + skip[0] * out
        dv[at, :] = dvalue.astype(dtype)
        less[at] = leaving
        leaves[i, 0] = jnp.sum(leaving)
        return whole * dS + dot(query, (out * start[:, None]).astype(dtype), turn_a=True), dskip

    dstate[...], dskip = lax.fori_loop(0, n, body, (dlast[...], jnp.float32(0)))
    if scaled:
        dscale[1][0] = dskip


def _shared_pieces_kernel(q, k, v, total, step, states, do, after, documents, edges, *outputs, C, R, masked, scaled):
    dq, dk, more, kept = outputs
    query, key = q[...], k[...]
    dtype = key.dtype
    b = borders_at(C, pl.program_id(2), documents, edges, masked, whole=False)
    scores = jnp.where(b.seen, dot(query, key, turn_b=True), 0.0)

    def body(r, sums):
        own, out, S, dS = v[:, r, :], do[:, r, :], states[r], after[r]
        here = total[r]
        start, end, whole = edge_decays(here, total[r, C - 1], b)
        between = bounded_decays(here)
        if scaled:
            rate = step[r]
            between, end = between * rate[None, :], end * rate
        slope = dot(out, own, turn_b=True) * between
        owed = (out * start[:, None]).astype(dtype)
        dquery = dot(owed, S, turn_b=True)
        # what a position reads inside of the chunk less what is read of it, of the same numbers: over the chunk they add up to zero
        within = slope * scores
        more[r] = jnp.sum(within, axis=1) - jnp.sum(within, axis=0) + row_sums(query, dquery)
        kept[r, 0] = whole * jnp.sum(S.astype(FLOAT32) * dS)
        dkey = dot((own * end[:, None]).astype(dtype), dS, turn_b=True)
        return sums[0] + dquery, sums[1] + dkey, sums[2] + slope

    zeros = jnp.zeros(query.shape, FLOAT32)
    dquery, dkey, slopes = lax.fori_loop(0, R, body, (zeros, zeros, jnp.zeros((C, C), FLOAT32)))
    slopes = jnp.where(b.seen, slopes, 0.0).astype(dtype)
    dq[...] = (dquery + dot(slopes, key)).astype(dtype)
    dk[...] = (dkey + dot(slopes, query, turn_a=True)).astype(dtype)
