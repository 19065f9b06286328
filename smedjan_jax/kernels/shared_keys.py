"""What the sweeps of scalar_decay.py share with those of many values that share a query and a key, and these.

Mamba-2 brings a step for each value, which scales it, and a skip for each head, which adds the value itself to the output; both are done
inside of the kernels: steps in the exponents of the decays that leave a position, so that no scaled values are made. Backward, what a chunk
leaves to later ones is <value, its gradient> as much as <key, its gradient>, so that queries and keys are gone through for all values of a
chunk together.

Programs of all heads of a row run side by side: they read the same queries and keys, and their values lie together in memory. An array is
read where it is needed: loads are in flight long before, and what is read at once lies in registers at once.

Shapes: as in scalar_decay.py; vectors here are [B, H, T], a head's numbers side by side.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from smedjan_jax.kernels.special import LOG2_E, exp2
from smedjan_jax.kernels.tiles import (
    FLOAT32,
    NEVER,
    Borders,
    Launch,
    borders_at,
    call,
    chunk_specs,
    documents_or_none,
    dot,
    of_chunks,
    of_head,
    only,
    partial,
    row_sums,
    seen_turned,
    walk,
    whole_specs,
)

HIGHEST = 60.0  # an exponent of two that is finite, and above those of all steps


class Scale(NamedTuple):
    """Values become step * value, and skip * value is added to the outputs, float32."""

    step: jax.Array  # [B, T, G, R], none below 0; where one is 0 so is its gradient
    skip: jax.Array  # [G, R]


class Plan(NamedTuple):
    """How a problem is run. segments 0: as many as fill the GPU; parts: of K, in the gradients of queries and keys that values share."""

    chunk: int = 64
    segments: int = 0
    forward: Launch = Launch(4, 2)
    backward: Launch = Launch(4, 2)
    values: Launch = Launch(4, 2)
    pieces: Launch = Launch(4, 3)
    parts: int = 1


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


class _Exponents(NamedTuple):
    """Powers of two [B, H, T]: a decay from j to i >= j times j's step is 2^(late_i - early_j)."""

    late: jax.Array
    early: jax.Array


def _exponents(total: jax.Array, scale: Scale | None) -> _Exponents:
    late = total.swapaxes(1, 2) * LOG2_E
    return _Exponents(late, late if scale is None else late - jnp.log2(scale.step.swapaxes(1, 2)))


class _Edges(NamedTuple):
    """What stands in tiles.Decays beside `between`, with the steps in `end`."""

    start: jax.Array  # [C]
    end: jax.Array  # [C]
    whole: jax.Array


def _edges(late: jax.Array, early: jax.Array, last: jax.Array, b: Borders) -> _Edges:
    whole = exp2(last) if b.keeps is None else jnp.where(b.keeps, exp2(last), 0.0)
    end = exp2(last - early if b.writes is None else jnp.where(b.writes, last - early, NEVER))
    return _Edges(only(b.reads, exp2(late)), end, whole)


def _skips(scale: Scale | None) -> tuple[list[jax.Array], list[pl.BlockSpec]]:
    """Skips [H, 1], or a dummy, and their spec."""
    if scale is None:
        return [jnp.zeros((1, 1), FLOAT32)], [pl.BlockSpec((None, 1), lambda *_: (0, 0))]
    return [scale.skip], [pl.BlockSpec((None, 1), lambda b, h: (h, 0))]


def _shared_key(T: int, K: int, R: int) -> pl.BlockSpec:
    """[B, T, G, K], for a program (b, h)."""
    return pl.BlockSpec((None, T, None, K), lambda b, h: (b, 0, h // R, 0))


def _vector(T: int) -> pl.BlockSpec:
    """[B, H, T], for programs that walk."""
    return pl.BlockSpec((None, None, T), lambda b, h: (b, h, 0))


def shared_sweep(q, k, v, total, scale, state, docs: Any, plan: Plan) -> Any:
    """What `_sweep` of scalar_decay.py gives, for R values that share a query and a key."""
    (B, T, G, K), (H, V), C = q.shape, v.shape[2:], plan.chunk
    docs, masked = documents_or_none(docs)
    n, key, (skips, places) = T // C, _shared_key(T, K, H // G), _skips(scale)
    kernel = partial(_shared_sweep_kernel, C=C, n=n, masked=masked, scaled=scale is not None)
    specs = [key, key, walk(T, V), _vector(T), _vector(T), *places, of_head(K, V), *whole_specs(masked, T, n)]
    outputs = [(v.shape, v.dtype, walk(T, V)), ((B, H, n, K, V), v.dtype, of_chunks(n, K, V)), ((B, H, K, V), FLOAT32, of_head(K, V))]
    inputs = [q, k, v, *_exponents(total, scale), *skips, state, *docs]
    return call(kernel, plan.forward, (B, H), inputs, specs, outputs, together=True)


def _shared_sweep_kernel(q, k, v, late, early, skip, state, documents, edges, o, states, last, *, C, n, masked, scaled):
    def body(i, S):
        at = pl.ds(i * C, C)
        query, key, dtype = q[at, :], k[at, :], v.dtype
        b, behind, ahead = borders_at(C, i, documents, edges, masked), late[at], early[at]
        e = _edges(behind, ahead, late[i * C + C - 1], b)
        small = S.astype(dtype)
        states[i] = small
        out = dot(query, small) * e.start[:, None]
        # of pairs that are not seen the power may be anything
        scores = dot(query, key, turn_b=True) * exp2(behind[:, None] - ahead[None, :])
        inside = jnp.where(b.seen, scores, 0.0).astype(dtype)
        own = v[at, :]
        out = out + dot(inside, own)
        o[at, :] = (out + skip[0] * own if scaled else out).astype(dtype)
        return e.whole * S + dot(key, (own * e.end[:, None]).astype(dtype), turn_a=True)

    last[...] = lax.fori_loop(0, n, body, state[...])


def shared_back(q, k, v, total, scale, states, do, dlast, docs: Any, plan: Plan) -> Any:
    """What `_sweep_back` of scalar_decay.py gives, for R values that share a query and a key: a sweep back makes the gradients of values
    and leaves those of the states; then programs of a chunk go through its values and add the gradients of q and k up in registers.

    Inside a chunk these are products with the sum of all slopes: one for each chunk, not one for each value.
    """
    (B, T), H, C = q.shape[:2], v.shape[2], plan.chunk
    exponents, n = _exponents(total, scale), T // C
    dv, after, leaves, written, read, dstate, dskip = values_back(q, k, v, exponents, scale, do, dlast, docs, plan)
    dq, dk, reads, kept = pieces(q, k, v, exponents, states, do, after, docs, plan)
    flow = jnp.sum(leaves.reshape(B, H, n, C), axis=3) + jnp.sum(kept, axis=3)
    change = jnp.sum(reads, axis=1) + read - written
    dscale = ()
    if scale is not None:
        step = scale.step.swapaxes(1, 2)
        dscale = jnp.where(step > 0, written / step, 0.0).swapaxes(1, 2), jnp.sum(dskip, axis=2, keepdims=True)
    return dq, dk, dv, change.swapaxes(1, 2), flow[..., None], dstate, *dscale


def values_back(q, k, v, exponents: _Exponents, scale, do, dlast, docs: Any, plan: Plan) -> Any:
    """dv; the gradients of the states after the chunks [B, H, n, K, V]; for each position [B, H, T], <value, its gradient> through the
    state that goes out, and in all, and what it reads inside of the chunk; the gradient of the state; <value, gradient of the output> of
    the positions of a chunk [B, H, C], summed over the chunks.

    What is read and what is written inside of a chunk are of the same numbers, so that over the chunk they add up to the same.
    """
    (B, T, G, K), (H, V), C = q.shape, v.shape[2:], plan.chunk
    docs, masked = documents_or_none(docs)
    n, key, (skips, places) = T // C, _shared_key(T, K, H // G), _skips(scale)
    specs = [key, key, walk(T, V), _vector(T), _vector(T), *places, walk(T, V), of_head(K, V), *whole_specs(masked, T, n)]
    outputs = [
        *((v.shape, v.dtype, walk(T, V)), ((B, H, n, K, V), v.dtype, of_chunks(n, K, V))),
        *[((B, H, T), FLOAT32, _vector(T))] * 3,
        ((B, H, K, V), FLOAT32, of_head(K, V)),
        ((B, H, C), FLOAT32, _vector(C)),
    ]
    kernel = partial(_values_back_kernel, C=C, n=n, masked=masked, scaled=scale is not None)
    inputs = [q, k, v, *exponents, *skips, do, dlast, *docs]
    return call(kernel, plan.values, (B, H), inputs, specs, outputs, together=True)


def _values_back_kernel(q, k, v, late, early, skip, do, dlast, documents, edges, *outputs, C, n, masked, scaled):
    dv, after, leaves, written, read, dstate, dskip = outputs

    def body(m, carried):
        (dS, skipped), i = carried, n - 1 - m
        at = pl.ds(i * C, C)
        query, key, dtype = q[at, :], k[at, :], v.dtype
        b, behind, ahead = borders_at(C, i, documents, edges, masked), late[at], early[at]
        e = _edges(behind, ahead, late[i * C + C - 1], b)
        # of keys and queries: the values are the rows
        scores = dot(key, query, turn_b=True) * exp2(behind[None, :] - ahead[:, None])
        inside = jnp.where(seen_turned(b, C), scores, 0.0).astype(dtype)
        small = dS.astype(dtype)
        after[i] = small
        own = v[at, :]
        through = dot(key, small) * e.end[:, None]
        leaves[at] = row_sums(own, through)
        out = do[at, :]
        dvalue = through + dot(inside, out)
        written[at] = row_sums(own, dvalue)
        read[at] = row_sums(out, dot(inside, own, turn_a=True))
        if scaled:
            skipped, dvalue = skipped + row_sums(own, out.astype(FLOAT32)), dvalue + skip[0] * out
        dv[at, :] = dvalue.astype(dtype)
        return e.whole * dS + dot(query, (out * e.start[:, None]).astype(dtype), turn_a=True), skipped

    dstate[...], dskip[...] = lax.fori_loop(0, n, body, (dlast[...], jnp.zeros((C,), FLOAT32)))


def pieces(q, k, v, exponents: _Exponents, states, do, after, docs: Any, plan: Plan) -> Any:
    """dq, dk, what positions read of the state that comes in [B, parts, H, T], and <state, its gradient> over each chunk for each row of
    the state [B, H, n, K]."""
    (B, T, G, K), (H, V), C, P = q.shape, v.shape[2:], plan.chunk, plan.parts
    docs, masked = documents_or_none(docs)
    n, R, N = T // C, H // G, K // P
    shared = pl.BlockSpec((None, C, None, N), lambda x, g, i: (x // P, i, g, x % P))
    several = pl.BlockSpec((None, C, R, V), lambda x, g, i: (x // P, i, g, 0))
    vectors = pl.BlockSpec((None, R, C), lambda x, g, i: (x // P, g, i))
    matrices = pl.BlockSpec((None, R, None, N, V), lambda x, g, i: (x // P, g, i, x % P, 0))
    specs = [shared, shared, several, vectors, vectors, matrices, several, matrices, *_of_parts(chunk_specs(masked, C, n), P)]
    outputs = [
        *((q.shape, q.dtype, shared), (k.shape, k.dtype, shared)),
        ((B, P, H, T), FLOAT32, pl.BlockSpec((None, None, R, C), lambda x, g, i: (x // P, x % P, g, i))),
        ((B, H, n, K), FLOAT32, pl.BlockSpec((None, R, None, N), lambda x, g, i: (x // P, g, i, x % P))),
    ]
    kernel = partial(_shared_pieces_kernel, C=C, R=R, masked=masked)
    return call(kernel, plan.pieces, (B * P, G, n), [q, k, v, *exponents, states, do, after, *docs], specs, outputs)


def _of_parts(specs: list[pl.BlockSpec], P: int) -> list[pl.BlockSpec]:
    def turned(at: Any) -> Any:
        return lambda x, g, i: at(x // P, g, i)

    return [pl.BlockSpec(spec.block_shape, turned(spec.index_map)) for spec in specs]


def _shared_pieces_kernel(q, k, v, late, early, states, do, after, documents, edges, *outputs, C, R, masked):
    dq, dk, reads, kept = outputs
    query = q[...]
    dtype = query.dtype
    b = borders_at(C, pl.program_id(2), documents, edges, masked, whole=False)

    def body(r, sums):
        dquery, dkey, slopes = sums
        behind, ahead = late[r], early[r]
        e = _edges(behind, ahead, late[r, C - 1], b)
        S, dS = states[r], after[r]
        kept[r] = e.whole * row_sums(S, dS.astype(FLOAT32))
        out = do[:, r, :]
        owed = out * e.start[:, None]
        reads[r] = row_sums(owed, dot(query, S))
        dquery = dquery + dot(owed.astype(dtype), S, turn_b=True)
        own = v[:, r, :]
        dkey = dkey + dot((own * e.end[:, None]).astype(dtype), dS, turn_b=True)
        # of pairs that are not seen it is finite
        slope = dot(out, own, turn_b=True) * exp2(jnp.minimum(behind[:, None] - ahead[None, :], HIGHEST))
        return dquery, dkey, slopes + slope

    zeros = jnp.zeros(query.shape, FLOAT32)
    dquery, dkey, slopes = lax.fori_loop(0, R, body, (zeros, zeros, jnp.zeros((C, C), FLOAT32)))
    slopes = jnp.where(b.seen, slopes, 0.0).astype(dtype)
    dq[...] = (dquery + dot(slopes, k[...])).astype(dtype)
    dk[...] = (dkey + dot(slopes, query, turn_a=True)).astype(dtype)
