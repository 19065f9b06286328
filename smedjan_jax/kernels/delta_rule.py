"""The gated delta rule in kernels (Yang et al., 2024; the equations stand in mixers/gated_deltanet.py). S is [K, V] here.

    X = (I + below(beta (K K^T) D))^-1;  u = X beta (V - e^c K S);  o = e^c Q S + ((Q K^T) D) u
    S' = e^{c_C} S + (e^{c_C - c} K)^T u                                           D_ij = e^{c_i - c_j}, i >= j

Forward: X of all chunks at once, then a sweep with S in registers, which leaves the state before each chunk. Backward: a sweep back
with dS that makes dV and leaves dS after each chunk; the rest takes every chunk by itself, all at once. With z = X^T du,

    dV = beta z;  dM = -z u^T, so (K K^T)'s gradient is -(dV u^T) D below the diagonal;  dbeta_i = z_i . u_i / beta_i

and the log decay's needs no product (tiles.decay_gradient). Sweeps may take parts of V, which do not meet.

Shapes: as in tiles.py; q, k, v [B, T, H, K or V], the log decay g and beta [B, T, H].
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from smedjan_jax.kernels.tiles import (
    FLOAT32,
    SMALLEST,
    DeltaPlan,
    borders_at,
    call,
    chunk_specs,
    decay_gradient,
    decays,
    dot,
    fill_parts,
    fitting,
    numbers,
    of_chunk,
    of_chunks,
    of_head,
    padded,
    partial,
    piece,
    piece_number,
    piece_vector,
    power_of_two,
    product,
    row_sums,
    running_sums,
    unit_lower_inverse,
    walk,
    walk_vector,
    whole_specs,
)

Arrays = tuple[jax.Array, ...]


def _plan(width: int, K: int, V: int) -> DeltaPlan:
    """What was fastest on an H100, with fewer loads in flight where shared memory would not hold them. width: bytes of a number."""
    plan = DeltaPlan(64 if width == 2 else 32)
    step = width * plan.chunk * (2 * K + V + plan.chunk)
    return plan._replace(forward=fitting(plan.forward, step), backward=fitting(plan.backward, step))


def gated_delta_rule(
    arrays: Arrays, state: jax.Array, documents: jax.Array | None, plan: DeltaPlan | None = None
) -> tuple[jax.Array, jax.Array]:
    """The twin of mixers.gated_deltanet.gated_delta_rule: o [B, T, H, V] in the dtype of q and the float32 state [B, H, V, K].

    arrays: q, k, v [B, T, H, K], log decay and beta [B, T, H] float32; state [B, H, V, K] float32; documents [B, T].
    """
    q, k, v, g, beta = arrays
    plan = plan or _plan(q.dtype.itemsize, power_of_two(q.shape[-1]), power_of_two(v.shape[-1]))
    (B, T, H, K), V, C = q.shape, v.shape[-1], plan.chunk
    wide_K, wide_V, size = power_of_two(K), power_of_two(V), C * -(-T // C)
    q, k, v = (padded(padded(x, -1, w), 1, size) for x, w in ((q, wide_K), (k, wide_K), (v, wide_V)))
    g, beta = padded(g, 1, size), padded(beta, 1, size)
    state = padded(padded(state.swapaxes(-1, -2), -1, wide_V), -2, wide_K)
    docs = None if documents is None else numbers(documents, None, size, C)
    parts = plan.parts or fill_parts(B * H, wide_V)
    o, last = _core(q, k, v, g, beta, state, docs, plan._replace(parts=parts))
    return o[:, :T, :, :V], last[:, :, :K, :V].swapaxes(-1, -2)


def _outputs(q, k, v, g, beta, state, docs, plan):
    return _forward(q, k, v, g, beta, state, docs, plan)[0]


def _forward(q, k, v, g, beta, state, docs, plan):
    total = running_sums(g, docs and docs[0], plan.chunk)
    x = _inverses(k, total, beta, docs, plan)
    o, states, last = _sweep(q, k, v, total, beta, x, state, docs, plan)
    return (o, last), (q, k, v, total, beta, x, states, docs)


def _backward(plan, saved, cotangents):
    q, k, v, total, beta, x, states, docs = saved
    do, dlast = cotangents
    dv, after, dstate = _sweep_back(q, k, total, beta, x, do, dlast, docs, plan)
    dq, dk, change, flow, dbeta = _pieces(q, k, v, total, beta, x, states, do, dv, after, docs, plan)
    dg = decay_gradient(change, flow, docs and docs[0], plan.chunk)
    return dq, dk, dv, dg, dbeta, dstate, None


_core: Any = jax.custom_vjp(_outputs, nondiff_argnums=(7,))
_core.defvjp(_forward, _backward)


def _documents(docs: Any) -> tuple[Any, bool]:
    return (numbers(None, None, 0, 1), False) if docs is None else (docs, True)


def _inverses(k: jax.Array, total: jax.Array, beta: jax.Array, docs: Any, plan: DeltaPlan) -> jax.Array:
    """X of every chunk [B, H, n, C, C], in the compute dtype."""
    (B, T, H, K), C = k.shape, plan.chunk
    docs, masked = _documents(docs)
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
        decay = jnp.where(seen, jnp.exp(jnp.where(seen, total[rows][:, None] - total[columns][None, :], 0.0)), 0.0)
        return dot(k[rows, :], k[columns, :], turn_b=True) * decay * beta[rows][:, None]

    inverses = [unit_lower_inverse(matrix(part, part, True), exact) for part in parts]
    for part, inverse in zip(parts, inverses, strict=True):
        x[part, part] = inverse.astype(x.dtype)
    if len(parts) == 2:
        corner = matrix(parts[1], parts[0], False)
        x[parts[1], parts[0]] = -product(product(inverses[1], corner, exact), inverses[0], exact).astype(x.dtype)
        x[parts[0], parts[1]] = jnp.zeros((half, half), x.dtype)


def _sweep(q, k, v, total, beta, x, state, docs, plan: DeltaPlan) -> Any:
    """Outputs [B, T, H, V], the state before every chunk [B, H, n, K, V], the last one [B, H, K, V] float32."""
    (B, T, H, K), V, C, parts = q.shape, v.shape[-1], plan.chunk, plan.parts
    docs, masked = _documents(docs)
    n = T // C
    specs = [walk(T, K), walk(T, K), walk(T, V, parts), walk_vector(T), walk_vector(T), of_chunks(n, C, C), of_head(K, V, parts)]
    outputs = [
        ((B, T, H, V), v.dtype, walk(T, V, parts)),
        ((B, H, n, K, V), v.dtype, of_chunks(n, K, V, parts)),
        ((B, H, K, V), FLOAT32, of_head(K, V, parts)),
    ]
    kernel = partial(_sweep_kernel, C=C, n=n, masked=masked)
    specs += whole_specs(masked, T, n)
    return call(kernel, plan.forward, (B, H, parts), [q, k, v, total, beta, x, state, *docs], specs, outputs)


def _sweep_kernel(q, k, v, total, beta, x, state, documents, edges, o, states, last, *, C, n, masked):
    def body(i, S):
        at = pl.ds(i * C, C)
        query, key = q[at, :], k[at, :]
        dtype = key.dtype
        d = decays(total[at], total[i * C + C - 1], borders_at(C, i, documents, edges, masked))
        small, start = S.astype(dtype), d.start[:, None]
        states[i] = small
        u = dot(x[i], ((v[at, :] - start * dot(key, small)) * beta[at][:, None]).astype(dtype)).astype(dtype)
        inside = (dot(query, key, turn_b=True) * d.between).astype(dtype)
        o[at, :] = (start * dot(query, small) + dot(inside, u)).astype(o.dtype)
        return d.whole * S + dot((key * d.end[:, None]).astype(dtype), u, turn_a=True)

    last[...] = lax.fori_loop(0, n, body, state[...])


def _sweep_back(q, k, total, beta, x, do, dlast, docs, plan: DeltaPlan) -> Any:
    """d v [B, T, H, V], d of the state after every chunk [B, H, n, K, V], d of the first state [B, H, K, V] float32."""
    (B, T, H, K), V, C, parts = q.shape, do.shape[-1], plan.chunk, plan.parts
    docs, masked = _documents(docs)
    n = T // C
    specs = [walk(T, K), walk(T, K), walk_vector(T), walk_vector(T), of_chunks(n, C, C), walk(T, V, parts), of_head(K, V, parts)]
    outputs = [
        ((B, T, H, V), do.dtype, walk(T, V, parts)),
        ((B, H, n, K, V), do.dtype, of_chunks(n, K, V, parts)),
        ((B, H, K, V), FLOAT32, of_head(K, V, parts)),
    ]
    kernel = partial(_sweep_back_kernel, C=C, n=n, masked=masked)
    specs += whole_specs(masked, T, n)
    return call(kernel, plan.backward, (B, H, parts), [q, k, total, beta, x, do, dlast, *docs], specs, outputs)


def _sweep_back_kernel(q, k, total, beta, x, do, dlast, documents, edges, dv, after, dstate, *, C, n, masked):
    def body(m, dS):
        i = n - 1 - m
        at = pl.ds(i * C, C)
        query, key, out = q[at, :], k[at, :], do[at, :]
        dtype = key.dtype
        d = decays(total[at], total[i * C + C - 1], borders_at(C, i, documents, edges, masked))
        small, start = dS.astype(dtype), d.start[:, None]
        after[i] = small
        inside = (dot(query, key, turn_b=True) * d.between).astype(dtype)
        du = dot(inside, out, turn_a=True) + dot((key * d.end[:, None]).astype(dtype), small)
        dvalue = dot(x[i], du.astype(dtype), turn_a=True) * beta[at][:, None]
        dv[at, :] = dvalue.astype(dv.dtype)
        read = dot(query, (start * out).astype(dtype), turn_a=True) - dot(key, (start * dvalue).astype(dtype), turn_a=True)
        return d.whole * dS + read

    dstate[...] = lax.fori_loop(0, n, body, dlast[...])


def _pieces(q, k, v, total, beta, x, states, do, dv, after, docs, plan: DeltaPlan) -> Any:
    """d of q, k [B, T, H, K], what makes that of the log decay (tiles.decay_gradient), d of beta [B, T, H] float32."""
    (B, T, H, K), V, C = q.shape, v.shape[-1], plan.chunk
    docs, masked = _documents(docs)
    n = T // C
    specs = [*(piece(C, K), piece(C, K), piece(C, V), piece_vector(C), piece_vector(C), of_chunk(C, C), of_chunk(K, V))]
    specs += [piece(C, V), piece(C, V), of_chunk(K, V), *chunk_specs(masked, C, n)]
    vector = (B, T, H), FLOAT32, piece_vector(C)
    outputs = [((B, T, H, K), q.dtype, piece(C, K))] * 2 + [vector, ((B, H, n, 1), FLOAT32, piece_number()), vector]
    kernel = partial(_piece_kernel, C=C, masked=masked)
    return call(kernel, plan.pieces, (B, H, n), [q, k, v, total, beta, x, states, do, dv, after, *docs], specs, outputs)


def _piece_kernel(q, k, v, total, beta, x, states, do, dv, after, documents, edges, dq, dk, change, flow, dbeta, *, C, masked):
    key, value, S, dS, rate = k[...], v[...], states[...], after[...], beta[...]
    dtype = key.dtype
    b = borders_at(C, pl.program_id(2), documents, edges, masked, whole=False)
    d = decays(total[...], total[C - 1], b)
    start, end = d.start[:, None], d.end[:, None]
    u = dot(x[...], ((value - start * dot(key, S)) * rate[:, None]).astype(dtype)).astype(dtype)
    out, query, dvalue = do[...], q[...], dv[...]
    slope = (dot(out, u, turn_b=True) * d.between).astype(dtype)
    dquery = dot(slope, key) + dot((start * out).astype(dtype), S, turn_b=True)
    dq[...] = dquery.astype(dq.dtype)
    outwards = end * dot(u, dS, turn_b=True)
    flow[0] = d.whole * jnp.sum(S.astype(FLOAT32) * dS) + jnp.sum(key * outwards)
    dbeta[...] = jnp.where(rate > 0, row_sums(dvalue, u.astype(FLOAT32)) / jnp.where(rate > 0, rate * rate, 1.0), 0.0)
    pairs = (-dot(dvalue, u, turn_b=True) * jnp.where(b.below, d.between, 0.0)).astype(dtype)
    written = outwards + dot(slope, query, turn_a=True) + dot(pairs, key, turn_a=True)
    read = dot(pairs, key) - dot((start * dvalue).astype(dtype), S, turn_b=True)
    dk[...] = (written + read).astype(dk.dtype)
    # what position i reads grows with its decay, what others read of it falls; by the same rounded tiles, so that both cancel
    change[...] = row_sums(query, dquery) + row_sums(key, read - written)
