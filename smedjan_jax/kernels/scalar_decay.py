"""The core of linear attention and Mamba-2 as one sweep each way (the equations stand in mixers/decay.py).

    o = ((Q K^T) D) V + e^c Q S;   S' = e^{c_C} S + (e^{c_C - c} K)^T V            D_ij = e^{c_i - c_j}, i >= j

A program walks through the chunks of one head with S in registers and leaves the state before each chunk for the backward sweep, which
walks back with dS. The decay's gradient costs no product (tiles.decay_gradient).

Where heads and rows are too few to fill the GPU a sequence is cut into segments. The sum of each segment is made first, all at once; a
short scan joins them; then the segments are swept as if they were rows, each from its own state.

Shapes: as in tiles.py; G keys for each position, with R values each and Q queries; H = G R programs a row. N segments.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from smedjan_jax.kernels.tiles import (
    FILLED,
    FLOAT32,
    SHARED_BYTES,
    SMALLEST,
    Launch,
    borders_at,
    call,
    chunk_specs,
    decay_gradient,
    decays,
    dot,
    fitting,
    numbers,
    of_chunks,
    of_head,
    padded,
    partial,
    power_of_two,
    row_sums,
    running_sums,
    walk,
    walk_numbers,
    walk_vector,
    whole_specs,
)

SHORTEST_SEGMENT = 512
PART = 64  # of the features of shared keys, for a program that adds up over values


class Plan(NamedTuple):
    """How a problem is run. segments 0: as many as fill the GPU."""

    chunk: int = 64
    segments: int = 0
    forward: Launch = Launch(4, 2)
    backward: Launch = Launch(4, 2)
    values: Launch = Launch(4, 2)
    pieces: Launch = Launch(4, 3)


def _plan(width: int, Q: int, R: int, K: int, V: int) -> Plan:
    """What was fastest on an H100, with smaller chunks and fewer loads in flight where shared memory would not hold them.

    width: bytes of a number.
    """

    def step(C: int) -> int:  # of the backward sweep, which reads queries and the outputs' gradients twice
        return width * (C * (2 * Q + 1) * (K + V) + K * V)

    plan = Plan(64 if width == 2 else 32)
    while step(plan.chunk) > SHARED_BYTES and plan.chunk > SMALLEST:
        plan = plan._replace(chunk=plan.chunk // 2)
    C = plan.chunk
    forward = width * C * (K + V) * (Q + 1)
    return plan._replace(
        forward=fitting(Launch(4, 3 if R > 1 else 2), forward),
        backward=fitting(plan.backward, step(C)),
        values=fitting(plan.values, width * C * (2 * K + V)),
        pieces=fitting(plan.pieces, width * 2 * V * (C + K)),
    )


def scalar_decay(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    state: jax.Array | None = None,
    documents: jax.Array | None = None,
    plan: Plan | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The twin of mixers.decay.scalar_decay: outputs [B, T, G, Q, R, V] in the dtype of value, and the float32 state [B, G, R, K, V].

    query [B, T, G, Q, K], key [B, T, G, K], value [B, T, G, R, V], log_decay [B, T, G, R]; Q or R is 1.
    """
    (B, T, G, Q, K), (R, V) = query.shape, value.shape[3:]
    assert min(Q, R) == 1, "several queries and several values for one key"
    plan = plan or _plan(value.dtype.itemsize, Q, R, power_of_two(K), power_of_two(V))
    H, C, wide_K, wide_V = G * R, plan.chunk, power_of_two(K), power_of_two(V)
    N = plan.segments or _segments(B * H, T)
    size = N * C * -(-T // (N * C))
    query, key, value = (padded(x.astype(value.dtype), -1, w) for x, w in ((query, wide_K), (key, wide_K), (value, wide_V)))
    query, key, value, log_decay = (padded(x, 1, size) for x in (query, key, value, log_decay))
    if state is None:
        state = jnp.zeros((B, G, R, K, V), FLOAT32)
    state = padded(padded(state, -1, wide_V), -2, wide_K).reshape(B, H, wide_K, wide_V)
    arrays: Any = query.reshape(B, size, G * Q, wide_K), key, value.reshape(B, size, H, wide_V), log_decay.reshape(B, size, H)
    o, last = _core(*arrays, state, documents, plan._replace(segments=N))
    return o.reshape(B, size, G, Q, R, wide_V)[:, :T, ..., :V], last.reshape(B, G, R, wide_K, wide_V)[..., :K, :V]


def _segments(programs: int, T: int) -> int:
    N = 1
    while programs * N < FILLED and T // (2 * N) >= SHORTEST_SEGMENT:
        N *= 2
    return N


def _outputs(q, k, v, g, state, documents, plan):
    return _forward(q, k, v, g, state, documents, plan)[0]


def _forward(q, k, v, g, state, documents, plan):
    """q [B, T, G Q, K], k [B, T, G, K], v [B, T, H, V], g [B, T, H] float32, state [B, H, K, V]; o [B, T, H Q, V]."""
    N = plan.segments
    docs = _segment_documents(documents, q.shape[1], plan)
    q, k, v, g = (_cut(x, N) for x in (q, k, v, g))
    total = running_sums(g, docs and docs[0], plan.chunk)
    starts = state
    if N > 1:
        starts = _joined(_sum(k, v, total, docs, plan, back=False), state, g, docs, back=False)
    o, states, ends = _sweep(q, k, v, total, starts, docs, plan)
    return (_join(o, N), ends[N - 1 :: N]), (q, k, v, g, total, docs, states)


def _backward(plan, saved, cotangents):
    q, k, v, g, total, docs, states = saved
    do, dlast = cotangents
    N = plan.segments
    out, ends = _cut(do.astype(v.dtype), N), dlast
    if N > 1:
        ends = _joined(_sum(q, out, total, docs, plan, back=True), dlast, g, docs, back=True)
    gradients = _sweep_back if v.shape[2] == k.shape[2] else _shared_back
    dq, dk, dv, change, flow, dstates = gradients(q, k, v, total, states, out, ends, docs, plan)
    dg = decay_gradient(change, flow, docs and docs[0], plan.chunk)
    return *(_join(x, N) for x in (dq, dk, dv, dg)), dstates[::N], None


_core: Any = jax.custom_vjp(_outputs, nondiff_argnums=(6,))
_core.defvjp(_forward, _backward)


def _cut(x: jax.Array, N: int) -> jax.Array:
    """[B, T, ...] -> [B N, T / N, ...]."""
    return x.reshape(x.shape[0] * N, -1, *x.shape[2:])


def _join(x: jax.Array, N: int) -> jax.Array:
    return x.reshape(x.shape[0] // N, -1, *x.shape[2:])


def _segment_documents(documents: jax.Array | None, T: int, plan: Plan) -> tuple[jax.Array, jax.Array] | None:
    """Documents of the segments' positions [B N, T / N], and of the states around their chunks [B N, n + 1]."""
    if documents is None:
        return None
    documents = jnp.pad(documents.astype(jnp.int32), ((0, 0), (0, T - documents.shape[1])), mode="edge")
    ends = documents.reshape(len(documents), plan.segments, -1)[:, :, -1]
    before = jnp.concatenate([documents[:, :1], ends[:, :-1]], axis=1).reshape(-1)
    cut = _cut(documents, plan.segments)
    return numbers(cut, before, cut.shape[1], plan.chunk)


def _joined(own: jax.Array, state: jax.Array, g: jax.Array, docs: Any, back: bool) -> jax.Array:
    """The states at the segments' beginnings [B N, H, K, V] (with `back` the gradients at their ends), from the segments' own sums."""
    B, N = len(state), len(own) // len(state)
    keep = jnp.exp(jnp.sum(g, axis=1))
    if docs is not None:
        keep = jnp.where((docs[1][:, 0] == docs[1][:, -1])[:, None], keep, 0.0)
    segments = own.reshape(B, N, *own.shape[1:]).swapaxes(0, 1), keep.reshape(B, N, -1).swapaxes(0, 1)

    def step(S, segment):
        own, keep = segment
        return keep[..., None, None] * S + own, S

    return lax.scan(step, state, segments, reverse=back)[1].swapaxes(0, 1).reshape(own.shape)


def _documents(docs: Any) -> tuple[tuple[jax.Array, jax.Array], bool]:
    return (numbers(None, None, 0, 1), False) if docs is None else (docs, True)


def _shared(T: int, features: int, heads: int, programs: int) -> pl.BlockSpec:
    """[B, T, heads, features]: the heads of a program, several or one that other programs read too."""
    if heads < programs:
        return pl.BlockSpec((None, T, 1, features), lambda b, h: (b, 0, h // (programs // heads), 0))
    return pl.BlockSpec((None, T, heads // programs, features), lambda b, h: (b, 0, h, 0))


def _sum(k: jax.Array, v: jax.Array, total: jax.Array, docs: Any, plan: Plan, back: bool) -> jax.Array:
    """What each row adds to a state [B, H, K, V]: decayed to its end; or with `back`, of queries and the outputs' gradients, to its
    beginning."""
    (B, T, heads, K), V, H, C = k.shape, v.shape[3], total.shape[2], plan.chunk
    docs, masked = _documents(docs)
    n, count = T // C, v.shape[2] // H
    kernel = partial(_sum_kernel, C=C, n=n, masked=masked, back=back, count=count)
    specs = [_shared(T, K, heads, H), _shared(T, V, H * count, H), walk_vector(T), *whole_specs(masked, T, n)]
    return call(kernel, plan.forward, (B, H), [k, v, total, *docs], specs, [((B, H, K, V), FLOAT32, of_head(K, V))])[0]


def _sum_kernel(k, v, total, documents, edges, out, *, C, n, masked, back, count):
    def body(m, S):
        i = n - 1 - m if back else m
        at = pl.ds(i * C, C)
        d = decays(total[at], total[i * C + C - 1], borders_at(C, i, documents, edges, masked))
        weight, S = (d.start if back else d.end)[:, None], d.whole * S
        for j in range(count):
            S = S + dot(k[at, j, :], (v[at, j, :] * weight).astype(v.dtype), turn_a=True)
        return S

    out[...] = lax.fori_loop(0, n, body, jnp.zeros(out.shape, FLOAT32))


def _sweep(q: jax.Array, k: jax.Array, v: jax.Array, total: jax.Array, state: jax.Array, docs: Any, plan: Plan) -> Any:
    """Outputs [B, T, H Q, V], the state before every chunk [B, H, n, K, V], the last one [B, H, K, V] float32."""
    (B, T, heads, K), (H, V), C = q.shape, v.shape[2:], plan.chunk
    docs, masked = _documents(docs)
    n, count = T // C, max(1, heads // H)
    kernel = partial(_sweep_kernel, C=C, n=n, masked=masked, count=count)
    rows = [_shared(T, K, heads, H), _shared(T, K, k.shape[2], H), walk(T, V), walk_vector(T)]
    outputs = [
        ((B, T, H * count, V), v.dtype, _shared(T, V, H * count, H)),
        ((B, H, n, K, V), v.dtype, of_chunks(n, K, V)),
        ((B, H, K, V), FLOAT32, of_head(K, V)),
    ]
    return call(kernel, plan.forward, (B, H), [q, k, v, total, state, *docs], [*rows, of_head(K, V), *whole_specs(masked, T, n)], outputs)


def _sweep_kernel(q, k, v, total, state, documents, edges, o, states, last, *, C, n, masked, count):
    def body(i, S):
        at = pl.ds(i * C, C)
        key, value = k[at, 0, :], v[at, :]
        dtype = value.dtype
        d = decays(total[at], total[i * C + C - 1], borders_at(C, i, documents, edges, masked))
        small = S.astype(dtype)
        states[i] = small
        for j in range(count):
            query = q[at, j, :]
            inside = (dot(query, key, turn_b=True) * d.between).astype(dtype)
            o[at, j, :] = (dot(inside, value) + dot(query, small) * d.start[:, None]).astype(o.dtype)
        return d.whole * S + dot(key, (value * d.end[:, None]).astype(dtype), turn_a=True)

    last[...] = lax.fori_loop(0, n, body, state[...])


def _sweep_back(q, k, v, total, states, do, dlast, docs: Any, plan: Plan) -> Any:
    """Gradients of q, k, v, what makes that of g (tiles.decay_gradient), and that of the state before the row; one value for each key."""
    (B, T, heads, K), (H, V), C = q.shape, v.shape[2:], plan.chunk
    docs, masked = _documents(docs)
    n, count = T // C, heads // H
    kernel = partial(_sweep_back_kernel, C=C, n=n, masked=masked, count=count)
    rows = [_shared(T, K, heads, H), walk(T, K), walk(T, V), walk_vector(T)]
    specs = [*rows, of_chunks(n, K, V), _shared(T, V, heads, H), of_head(K, V), *whole_specs(masked, T, n)]
    outputs = [
        (q.shape, q.dtype, _shared(T, K, heads, H)),
        (k.shape, k.dtype, walk(T, K)),
        (v.shape, v.dtype, walk(T, V)),
        ((B, T, H), FLOAT32, walk_vector(T)),
        ((B, H, n, 1), FLOAT32, walk_numbers(n)),
        ((B, H, K, V), FLOAT32, of_head(K, V)),
    ]
    return call(kernel, plan.backward, (B, H), [q, k, v, total, states, do, dlast, *docs], specs, outputs)


def _sweep_back_kernel(q, k, v, total, states, do, dlast, documents, edges, dq, dk, dv, change, flow, dstate, *, C, n, masked, count):
    def body(m, dS):
        i = n - 1 - m
        at = pl.ds(i * C, C)
        key, value, S = k[at, :], v[at, :], states[i]
        dtype = value.dtype
        d = decays(total[at], total[i * C + C - 1], borders_at(C, i, documents, edges, masked))
        start, end = d.start[:, None], d.end[:, None]
        small, owed = dS.astype(dtype), d.whole * jnp.sum(S * dS)
        # each gradient is stored before the next is begun: with all of them in registers at once these spill
        more, dkey = jnp.zeros((C,), FLOAT32), 0.0
        for j in range(count):
            query, out = q[at, j, :], do[at, j, :]
            slope = (dot(out, value, turn_b=True) * d.between).astype(dtype)
            dquery = dot(slope, key) + dot(out, S, turn_b=True) * start
            dq[at, j, :] = dquery.astype(dq.dtype)
            more, dkey = more + row_sums(query, dquery), dkey + dot(slope, query, turn_a=True)
        outwards = dot(value, small, turn_b=True) * end  # what the keys add to the state that goes out
        flow[i, 0] = owed + jnp.sum(key * outwards)
        dkey = dkey + outwards
        dk[at, :] = dkey.astype(dk.dtype)
        change[at] = more - row_sums(key, dkey)
        dvalue, dS = dot(key, small) * end, d.whole * dS
        for j in range(count):
            query, out = q[at, j, :], do[at, j, :]
            inside = (dot(query, key, turn_b=True) * d.between).astype(dtype)
            dvalue, dS = dvalue + dot(inside, out, turn_a=True), dS + dot(query, (out * start).astype(dtype), turn_a=True)
        dv[at, :] = dvalue.astype(dv.dtype)
        return dS

    dstate[...] = lax.fori_loop(0, n, body, dlast[...])


def _shared_back(q, k, v, total, states, do, dlast, docs: Any, plan: Plan) -> Any:
    """The same for R values that share a query and a key: a sweep back makes d v and leaves the gradients of the states; then programs of
    a chunk and a part of K add the gradients of q and k up over the values, in registers."""
    (B, T, G, K), (H, V), C = q.shape, v.shape[2:], plan.chunk
    docs, masked = _documents(docs)
    n, R, parts = T // C, H // G, max(1, K // PART)
    specs = [_shared(T, K, G, H), _shared(T, K, G, H), walk_vector(T), walk(T, V), of_head(K, V), *whole_specs(masked, T, n)]
    outputs = [(v.shape, v.dtype, walk(T, V)), ((B, H, n, K, V), v.dtype, of_chunks(n, K, V)), ((B, H, K, V), FLOAT32, of_head(K, V))]
    kernel = partial(_values_back_kernel, C=C, n=n, masked=masked)
    dv, after, dstate = call(kernel, plan.values, (B, H), [q, k, total, do, dlast, *docs], specs, outputs)

    narrow = pl.BlockSpec((None, C, None, K // parts), lambda b, h, i: (b, i, h // parts, h % parts))
    several = pl.BlockSpec((None, C, R, V), lambda b, h, i: (b, i, h // parts, 0))
    vector = pl.BlockSpec((None, C, R), lambda b, h, i: (b, i, h // parts))
    matrices = pl.BlockSpec((None, R, None, K // parts, V), lambda b, h, i: (b, h // parts, i, h % parts, 0))
    specs = [narrow, narrow, several, vector, matrices, several, matrices, *chunk_specs(masked, C, n)]
    outputs = [
        *((q.shape, q.dtype, narrow), (k.shape, k.dtype, narrow)),
        ((parts, B, T, H), FLOAT32, pl.BlockSpec((None, None, C, R), lambda b, h, i: (h % parts, b, i, h // parts))),
        ((parts, B, H, n, 1), FLOAT32, pl.BlockSpec((None, None, R, None, 1), lambda b, h, i: (h % parts, b, h // parts, i, 0))),
    ]
    kernel = partial(_shared_piece_kernel, C=C, R=R, masked=masked)
    dq, dk, change, flow = call(kernel, plan.pieces, (B, G * parts, n), [q, k, v, total, states, do, after, *docs], specs, outputs)
    return dq, dk, dv, jnp.sum(change, axis=0), jnp.sum(flow, axis=0), dstate


def _values_back_kernel(q, k, total, do, dlast, documents, edges, dv, after, dstate, *, C, n, masked):
    def body(m, dS):
        i = n - 1 - m
        at = pl.ds(i * C, C)
        query, key, out = q[at, 0, :], k[at, 0, :], do[at, :]
        dtype = out.dtype
        d = decays(total[at], total[i * C + C - 1], borders_at(C, i, documents, edges, masked))
        small = dS.astype(dtype)
        after[i] = small
        inside = (dot(query, key, turn_b=True) * d.between).astype(dtype)
        dv[at, :] = (dot(inside, out, turn_a=True) + dot(key, small) * d.end[:, None]).astype(dtype)
        return d.whole * dS + dot(query, (out * d.start[:, None]).astype(dtype), turn_a=True)

    dstate[...] = lax.fori_loop(0, n, body, dlast[...])


def _shared_piece_kernel(q, k, v, total, states, do, after, documents, edges, dq, dk, change, flow, *, C, R, masked):
    query, key = q[...], k[...]
    dtype = key.dtype
    b = borders_at(C, pl.program_id(2), documents, edges, masked, whole=False)

    def body(r, sums):
        value, out, S, dS = v[:, r, :], do[:, r, :], states[r], after[r]
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
