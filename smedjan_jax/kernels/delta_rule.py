"""The gated delta rule in kernels (Yang et al., 2024; the equations stand in mixers/gated_deltanet.py). S is [K, V] here.

    X = (I + below(beta (K K^T) D))^-1;  u = X beta (V - e^c K S);  o = e^c Q S + ((Q K^T) D) u
    S' = e^{c_C} S + (e^{c_C - c} K)^T u                                           D_ij = e^{c_i - c_j}, i >= j

Forward: X of all chunks at once, then a sweep with S in registers, which leaves the state before each chunk. Backward: a sweep back
with dS that makes dV and leaves dS after each chunk; the rest takes every chunk by itself, all at once, with u as the forward sweep left it
in place of v. With z = X^T du,

    dV = beta z;  dM = -z u^T, so (K K^T)'s gradient is -(dV u^T) D below the diagonal;  dbeta_i = z_i . u_i / beta_i

and the log decay's needs no product (tiles.decay_gradient). Sweeps may take parts of V, which do not meet.

Where heads and rows are far too few to fill the GPU a sequence is cut into N segments (segments.py). What each makes of the state before
it, S -> M S + A, is made first, all at once; a short walk joins them; then the segments are swept as if they were rows, each from its
own state. Backward the same with M^T.

Shapes: as in tiles.py; q, k, v [B, T, H, K or V], the log decay g and beta [B, T, H].
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from smedjan_jax.kernels.segments import cut, first_state, join, joined, segment_documents, segments_that_pay
from smedjan_jax.kernels.special import exp
from smedjan_jax.kernels.tiles import (
    FLOAT32,
    NEVER,
    SMALLEST,
    Launch,
    borders_at,
    call,
    chunk_specs,
    decay_gradient,
    decays,
    documents_or_none,
    dot,
    fill_parts,
    fitting,
    of_chunk,
    of_chunks,
    of_head,
    padded,
    partial,
    piece,
    piece_vector,
    power_of_two,
    product,
    row_sums,
    running_sums,
    unit_lower_inverse,
    walk,
    walk_numbers,
    walk_vector,
    whole_specs,
)

Arrays = tuple[jax.Array, ...]


class Plan(NamedTuple):
    """How a problem is run. parts of V and segments of the sequence, 0: as many as fill the GPU; chunks that a program of pieces takes."""

    chunk: int
    parts: int = 0
    segments: int = 0
    chunks: int = 1
    inverse: Launch = Launch(2, 1)
    forward: Launch = Launch(4, 3)
    backward: Launch = Launch(4, 3)
    pieces: Launch = Launch(4, 1)


def _plan(width: int, K: int, V: int) -> Plan:
    """What was fastest on an H200, with fewer loads in flight where shared memory would not hold them. width: bytes of a number."""
    plan = Plan(64 if width == 2 else 32)
    step = width * plan.chunk * (2 * K + V + plan.chunk)
    if width == 2 and max(K, V) <= 64:  # a second chunk is loaded while one is worked on: 0.91 ms forward and backward in place of 1.07
        plan = plan._replace(chunks=2, pieces=Launch(4, 2))
    return plan._replace(forward=fitting(plan.forward, step), backward=fitting(plan.backward, step))


def gated_delta_rule(
    arrays: Arrays, state: jax.Array, documents: jax.Array | None, plan: Plan | None = None
) -> tuple[jax.Array, jax.Array]:
    """The twin of mixers.gated_deltanet.gated_delta_rule: o [B, T, H, V] in the dtype of q and the float32 state [B, H, V, K].

    arrays: q, k, v [B, T, H, K], log decay and beta [B, T, H] float32; state [B, H, V, K] float32; documents [B, T].
    """
    q, k, v, g, beta = arrays
    plan = plan or _plan(q.dtype.itemsize, power_of_two(q.shape[-1]), power_of_two(v.shape[-1]))
    (B, T, H, K), V, C = q.shape, v.shape[-1], plan.chunk
    wide_K, wide_V, N = power_of_two(K), power_of_two(V), plan.segments or segments_that_pay(B * H, T)
    size = N * C * -(-T // (N * C))
    q, k, v = (padded(padded(x, -1, w), 1, size) for x, w in ((q, wide_K), (k, wide_K), (v, wide_V)))
    g, beta = padded(g, 1, size), padded(beta, 1, size)
    state = padded(padded(state.swapaxes(-1, -2), -1, wide_V), -2, wide_K)
    docs = segment_documents(documents, size, N, C)
    parts = plan.parts or fill_parts(B * H * N, wide_V)
    arrays = tuple(cut(x, N) for x in (q, k, v, g, beta))
    o, last = _core(*arrays, state, docs, plan._replace(parts=parts, segments=N))
    return join(o, N)[:, :T, :, :V], last[:, :, :K, :V].swapaxes(-1, -2)


def _outputs(q, k, v, g, beta, state, docs, plan):
    return _forward(q, k, v, g, beta, state, docs, plan)[0]


def _forward(q, k, v, g, beta, state, docs, plan):
    """q, k [B N, T / N, H, K], v, g and beta likewise, docs of segments; state [B, H, K, V]."""
    N, whole = plan.segments, None
    total = running_sums(g, docs and docs[0], plan.chunk)
    x = _inverses(k, total, beta, docs, plan)
    starts = state
    if N > 1:
        own, whole = _summaries(k, v, total, beta, x, docs, plan)
        starts = joined(own, whole, state, N)
    o, states, ends, u = _sweep(q, k, v, total, beta, x, starts, docs, plan)
    return (o, ends[N - 1 :: N]), (q, k, u, total, beta, x, states, whole, docs)


def _backward(plan, saved, cotangents):
    q, k, u, total, beta, x, states, whole, docs = saved
    (do, dlast), N = cotangents, plan.segments
    ends = dlast
    if whole is not None:
        empty = jnp.zeros((*states.shape[:2], *states.shape[3:]), FLOAT32)
        added = _sweep_back(q, k, total, beta, x, do, empty, docs, plan, kept=False)[0]
        ends = joined(added, whole, dlast, N, back=True)
    dv, after, dstates = _sweep_back(q, k, total, beta, x, do, ends, docs, plan)
    dq, dk, change, flow, dbeta = _pieces(q, k, u, total, beta, states, do, dv, after, docs, plan)
    dg = decay_gradient(change, flow, docs and docs[0], plan.chunk)
    return dq, dk, dv, dg, dbeta, dstates[::N], None


_core: Any = jax.custom_vjp(_outputs, nondiff_argnums=(7,))
_core.defvjp(_forward, _backward)


def _inverses(k: jax.Array, total: jax.Array, beta: jax.Array, docs: Any, plan: Plan) -> jax.Array:
    """X of every chunk [B, H, n, C, C], in the compute dtype."""
    (B, T, H, K), C = k.shape, plan.chunk
    docs, masked = documents_or_none(docs)
    n = T // C
    kernel = partial(_inverse_kernel, C=C, masked=masked, exact=k.dtype == FLOAT32)
    specs = [piece(C, K), piece_vector(C), piece_vector(C), *chunk_specs(masked, C, n)]
    return call(kernel, plan.inverse, (B, H, n), [k, total, beta, *docs], specs, [((B, H, n, C, C), k.dtype, of_chunk(C, C))])[0]


def _inverse_kernel(k, total, beta, documents, edges, x, *, C, masked, exact):
    """By halves: [[A, 0], [M, D]]^-1 = [[A^-1, 0], [-D^-1 M A^-1, D^-1]], each half by doubling."""
    half = max(SMALLEST, C // 2)
    parts = [pl.ds(start, half) for start in range(0, C, half)]

    def matrix(rows, columns, below):
        seen = lax.broadcasted_iota(jnp.int32, (half, half), 0) > lax.broadcasted_iota(jnp.int32, (half, half), 1)
        seen = seen if below else seen | True
        if masked:
            seen = seen & (documents[rows][:, None] == documents[columns][None, :])
        decay = exp(jnp.where(seen, total[rows][:, None] - total[columns][None, :], NEVER))
        return dot(k[rows, :], k[columns, :], turn_b=True) * decay * beta[rows][:, None]

    inverses = [unit_lower_inverse(matrix(part, part, True), exact) for part in parts]
    for part, inverse in zip(parts, inverses, strict=True):
        x[part, part] = inverse.astype(x.dtype)
    if len(parts) == 2:
        corner = matrix(parts[1], parts[0], False)
        x[parts[1], parts[0]] = -product(product(inverses[1], corner, exact), inverses[0], exact).astype(x.dtype)
        x[parts[0], parts[1]] = jnp.zeros((half, half), x.dtype)


def _summaries(k, v, total, beta, x, docs, plan: Plan) -> Any:
    """What a segment makes of the state before it, S -> M S + A: A [B N, H, K, V] and M [B N, H, K, K] float32.

    By two sweeps with no outputs: A from an empty state, M from the columns of the identity without values.
    """
    (B, T, H, K), V, C = k.shape, v.shape[-1], plan.chunk
    docs, masked = documents_or_none(docs)
    n, found = T // C, []
    for columns, identity in ((V, False), (K, True)):
        parts = min(plan.parts, columns // SMALLEST)
        specs = [walk(T, K), walk(T, columns if not identity else V, parts if not identity else 1)]
        specs += [walk_vector(T), walk_vector(T), of_chunks(n, C, C), *whole_specs(masked, T, n)]
        kernel = partial(_summary_kernel, C=C, n=n, masked=masked, identity=identity)
        outputs = [((B, H, K, columns), FLOAT32, of_head(K, columns, parts))]
        found += call(kernel, plan.forward, (B, H, parts), [k, v, total, beta, x, *docs], specs, outputs)
    return found


def _summary_kernel(k, v, total, beta, x, documents, edges, out, *, C, n, masked, identity):
    def body(i, S):
        at = pl.ds(i * C, C)
        key, dtype = k[at, :], k.dtype
        d = decays(total[at], total[i * C + C - 1], borders_at(C, i, documents, edges, masked))
        read = -d.start[:, None] * dot(key, S.astype(dtype))
        u = dot(x[i], ((read if identity else v[at, :] + read) * beta[at][:, None]).astype(dtype)).astype(dtype)
        return d.whole * S + dot((key * d.end[:, None]).astype(dtype), u, turn_a=True)

    out[...] = lax.fori_loop(0, n, body, first_state(out, identity, pl.program_id(2)))


def _sweep(q, k, v, total, beta, x, state, docs, plan: Plan) -> Any:
    """Outputs [B, T, H, V], the state before every chunk [B, H, n, K, V], the last one [B, H, K, V] float32, u [B, T, H, V]."""
    (B, T, H, K), V, C, parts = q.shape, v.shape[-1], plan.chunk, plan.parts
    docs, masked = documents_or_none(docs)
    n = T // C
    specs = [walk(T, K), walk(T, K), walk(T, V, parts), walk_vector(T), walk_vector(T), of_chunks(n, C, C), of_head(K, V, parts)]
    outputs = [
        ((B, T, H, V), v.dtype, walk(T, V, parts)),
        ((B, H, n, K, V), v.dtype, of_chunks(n, K, V, parts)),
        ((B, H, K, V), FLOAT32, of_head(K, V, parts)),
        ((B, T, H, V), v.dtype, walk(T, V, parts)),
    ]
    kernel = partial(_sweep_kernel, C=C, n=n, masked=masked)
    specs += whole_specs(masked, T, n)
    return call(kernel, plan.forward, (B, H, parts), [q, k, v, total, beta, x, state, *docs], specs, outputs)


def _sweep_kernel(q, k, v, total, beta, x, state, documents, edges, o, states, last, wrote, *, C, n, masked):
    def body(i, S):
        at = pl.ds(i * C, C)
        query, key = q[at, :], k[at, :]
        dtype = key.dtype
        d = decays(total[at], total[i * C + C - 1], borders_at(C, i, documents, edges, masked))
        small, start = S.astype(dtype), d.start[:, None]
        states[i] = small
        u = dot(x[i], ((v[at, :] - start * dot(key, small)) * beta[at][:, None]).astype(dtype)).astype(dtype)
        wrote[at, :] = u
        inside = (dot(query, key, turn_b=True) * d.between).astype(dtype)
        o[at, :] = (start * dot(query, small) + dot(inside, u)).astype(o.dtype)
        return d.whole * S + dot((key * d.end[:, None]).astype(dtype), u, turn_a=True)

    last[...] = lax.fori_loop(0, n, body, state[...])


def _sweep_back(q, k, total, beta, x, do, dlast, docs, plan: Plan, kept: bool = True) -> Any:
    """d v [B, T, H, V], d of the state after every chunk [B, H, n, K, V], d of the first state [B, H, K, V] float32; the last alone
    where nothing else is `kept`."""
    (B, T, H, K), V, C, parts = q.shape, do.shape[-1], plan.chunk, plan.parts
    docs, masked = documents_or_none(docs)
    n = T // C
    specs = [walk(T, K), walk(T, K), walk_vector(T), walk_vector(T), of_chunks(n, C, C), walk(T, V, parts), of_head(K, V, parts)]
    outputs = [
        ((B, T, H, V), do.dtype, walk(T, V, parts)),
        ((B, H, n, K, V), do.dtype, of_chunks(n, K, V, parts)),
        ((B, H, K, V), FLOAT32, of_head(K, V, parts)),
    ]
    kernel = partial(_sweep_back_kernel, C=C, n=n, masked=masked, kept=kept)
    specs += whole_specs(masked, T, n)
    return call(kernel, plan.backward, (B, H, parts), [q, k, total, beta, x, do, dlast, *docs], specs, outputs if kept else outputs[2:])


def _sweep_back_kernel(q, k, total, beta, x, do, dlast, documents, edges, *refs, C, n, masked, kept):
    *places, dstate = refs  # of d v and of the states' gradients, where they are kept

    def body(m, dS):
        i = n - 1 - m
        at = pl.ds(i * C, C)
        query, key, out = q[at, :], k[at, :], do[at, :]
        dtype = key.dtype
        d = decays(total[at], total[i * C + C - 1], borders_at(C, i, documents, edges, masked))
        small, start = dS.astype(dtype), d.start[:, None]
        if kept:
            places[1][i] = small
        inside = (dot(query, key, turn_b=True) * d.between).astype(dtype)
        du = dot(inside, out, turn_a=True) + dot((key * d.end[:, None]).astype(dtype), small)
        dvalue = dot(x[i], du.astype(dtype), turn_a=True) * beta[at][:, None]
        if kept:
            places[0][at, :] = dvalue.astype(dtype)
        read = dot(query, (start * out).astype(dtype), turn_a=True) - dot(key, (start * dvalue).astype(dtype), turn_a=True)
        return d.whole * dS + read

    dstate[...] = lax.fori_loop(0, n, body, dlast[...])


def _pieces(q, k, u, total, beta, states, do, dv, after, docs, plan: Plan) -> Any:
    """d of q, k [B, T, H, K], what makes that of the log decay (tiles.decay_gradient), d of beta [B, T, H] float32.

    A program takes several chunks, so that what the next one needs is loaded while one is worked on.
    """
    (B, T, H, K), V, C = q.shape, do.shape[-1], plan.chunk
    docs, masked = documents_or_none(docs)
    n = T // C
    count, vector = math.gcd(plan.chunks, n), ((B, T, H), FLOAT32, walk_vector(T))
    specs = [walk(T, K), walk(T, K), walk(T, V), walk_vector(T), walk_vector(T), of_chunks(n, K, V), walk(T, V), walk(T, V)]
    specs += [of_chunks(n, K, V), *whole_specs(masked, T, n)]
    outputs = [((B, T, H, K), q.dtype, walk(T, K))] * 2 + [vector, ((B, H, n, 1), FLOAT32, walk_numbers(n)), vector]
    kernel = partial(_piece_kernel, C=C, count=count, masked=masked)
    return call(kernel, plan.pieces, (B, H, n // count), [q, k, u, total, beta, states, do, dv, after, *docs], specs, outputs)


def _piece_kernel(q, k, u, total, beta, states, do, dv, after, documents, edges, dq, dk, change, flow, dbeta, *, C, count, masked):
    first = pl.program_id(2) * count

    def body(j, _):
        i = first + j
        at = pl.ds(i * C, C)
        key, S, dS, rate = k[at, :], states[i], after[i], beta[at]
        dtype = key.dtype
        b = borders_at(C, i, documents, edges, masked)
        d = decays(total[at], total[i * C + C - 1], b)
        start, end = d.start[:, None], d.end[:, None]
        stays = d.whole * jnp.sum(S.astype(FLOAT32) * dS)  # first, so that both leave the registers
        value, out, query, dvalue = u[at, :], do[at, :], q[at, :], dv[at, :]
        owed = row_sums(dvalue, value.astype(FLOAT32))
        dbeta[at] = jnp.where(rate > 0, owed / jnp.where(rate > 0, rate * rate, 1.0), 0.0)
        pairs = (-dot(dvalue, value, turn_b=True) * jnp.where(b.below, d.between, 0.0)).astype(dtype)
        slope = (dot(out, value, turn_b=True) * d.between).astype(dtype)
        dquery = dot(slope, key) + dot((start * out).astype(dtype), S, turn_b=True)
        dq[at, :] = dquery.astype(dq.dtype)
        more = row_sums(query, dquery)
        # one sum of tiles, so that registers hold it: what the keys read, then what they write too
        dkey = dot(pairs, key) - dot((start * dvalue).astype(dtype), S, turn_b=True)
        more = more + 2 * row_sums(key, dkey)
        outwards = end * dot(value, dS, turn_b=True)
        flow[i, 0] = stays + jnp.sum(key * outwards)
        dkey = dkey + outwards + dot(slope, query, turn_a=True) + dot(pairs, key, turn_a=True)
        dk[at, :] = dkey.astype(dk.dtype)
        # what position i reads grows with its decay, what others read of it falls; by the same rounded tiles, so that both cancel
        change[at] = more - row_sums(key, dkey)
        return 0

    lax.fori_loop(0, count, body, 0)
