"""The core of linear attention and Mamba-2 as one sweep each way (the equations stand in mixers/decay.py).

    o = ((Q K^T) D) V + e^c Q S;   S' = e^{c_C} S + (e^{c_C - c} K)^T V            D_ij = e^{c_i - c_j}, i >= j

A program walks through the chunks of one head with S in registers and leaves the state before each chunk for the backward sweep, which
walks back with dS. The decay's gradient costs no product (tiles.decay_gradient).

Where heads and rows are too few to fill the GPU a sequence is cut into segments. The sum of each segment is made first, all at once; a
short scan joins them; then the segments are swept as if they were rows, each from its own state.

Shapes: as in tiles.py; G keys for each position, with R values each and Q queries; H = G R programs a row. N segments.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from smedjan_jax.kernels.segments import cut, fill_segments, join, segment_documents
from smedjan_jax.kernels.shared_keys import (
    Plan,
    Scale,
    heads_of,
    scale_inputs,
    scale_outputs,
    scaled_values,
    shared_back,
    shared_sweep,
    unscaled,
)
from smedjan_jax.kernels.tiles import (
    FILLED,
    FLOAT32,
    SHARED_BYTES,
    SMALLEST,
    Launch,
    borders_at,
    call,
    decay_gradient,
    decays,
    documents_or_none,
    dot,
    fitting,
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

PART = 64  # of the features of queries and keys, in the gradients of those that values share


def _plan(width: int, Q: int, R: int, K: int, V: int) -> Plan:
    """What was fastest on an H100 (of values that share a key on an H200), with smaller chunks and fewer loads in flight where shared
    memory would not hold them.

    Of Mamba-2 (64 x 1024 positions, 16 heads of 64, state 128), microseconds: the sweep 284 with three loads in flight, 290 with two, 334
    with one and 496 on 8 warps; back, the values 377 with two, 474 with one, 516 with three and 708 on 8 warps; queries and keys 299 in
    two parts, 309 and 401 in one on 8 warps (three and two loads in flight). Chunks of 128 positions: 368, 628 and 546 at best.

    width: bytes of a number.
    """

    def step(C: int) -> int:  # of the backward sweep, which reads queries and the outputs' gradients twice
        return width * (C * (2 * Q + 1) * (K + V) + K * V)

    plan = Plan(64 if width == 2 else 32, forward=Launch(4, 3 if R > 1 else 2), parts=max(1, K // PART))
    while step(plan.chunk) > SHARED_BYTES and plan.chunk > SMALLEST:
        plan = plan._replace(chunk=plan.chunk // 2)
    C = plan.chunk
    forward = width * C * (K + V) * (Q + 1)
    return plan._replace(
        forward=fitting(plan.forward, forward),
        backward=fitting(plan.backward, step(C)),
        values=fitting(plan.values, 2 * width * C * (K + V)),
        pieces=fitting(plan.pieces, width * 2 * V * (C + K // plan.parts)),
    )


def _segments(programs: int, T: int, R: int) -> int:
    """Sweeps of values that share a key fill a GPU with two programs for each of its processors: 8 x 8192 positions of Mamba-2 take 1,148
    microseconds in two segments, 1,320 in one."""
    return fill_segments(programs, T, 2 * FILLED if R > 1 else FILLED)


def scalar_decay(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    state: jax.Array | None = None,
    documents: jax.Array | None = None,
    plan: Plan | None = None,
    scale: Scale | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The twin of mixers.decay.scalar_decay: outputs [B, T, G, Q, R, V] in the dtype of value, and the float32 state [B, G, R, K, V].

    query [B, T, G, Q, K], key [B, T, G, K], value [B, T, G, R, V], log_decay [B, T, G, R]; Q or R is 1, with `scale` Q.
    """
    (B, T, G, Q, K), (R, V) = query.shape, value.shape[3:]
    assert min(Q, R) == 1, "several queries and several values for one key"
    assert scale is None or Q == 1, "several queries of scaled values"
    plan = plan or _plan(value.dtype.itemsize, Q, R, power_of_two(K), power_of_two(V))
    H, C, wide_K, wide_V = G * R, plan.chunk, power_of_two(K), power_of_two(V)
    N = plan.segments or _segments(B * H, T, R)
    size = N * C * -(-T // (N * C))
    query, key, value = (padded(x.astype(value.dtype), -1, w) for x, w in ((query, wide_K), (key, wide_K), (value, wide_V)))
    query, key, value, log_decay = (padded(x, 1, size) for x in (query, key, value, log_decay))
    if state is None:
        state = jnp.zeros((B, G, R, K, V), FLOAT32)
    state = padded(padded(state, -1, wide_V), -2, wide_K).reshape(B, H, wide_K, wide_V)
    arrays: Any = query.reshape(B, size, G * Q, wide_K), key, value.reshape(B, size, H, wide_V), log_decay.reshape(B, size, H)
    if scale is not None:
        scale = Scale(padded(scale.step, 1, size).reshape(B, size, H), scale.skip.reshape(H, 1))
    o, last = _core(*arrays, scale, state, documents, plan._replace(segments=N))
    return o.reshape(B, size, G, Q, R, wide_V)[:, :T, ..., :V], last.reshape(B, G, R, wide_K, wide_V)[..., :K, :V]


def _outputs(q, k, v, g, scale, state, documents, plan):
    return _forward(q, k, v, g, scale, state, documents, plan)[0]


def _forward(q, k, v, g, scale, state, documents, plan):
    """q [B, T, G Q, K], k [B, T, G, K], v [B, T, H, V], g [B, T, H] float32, state [B, H, K, V]; o [B, T, H Q, V]."""
    N = plan.segments
    docs = segment_documents(documents, q.shape[1], N, plan.chunk)
    q, k, v, g = (cut(x, N) for x in (q, k, v, g))
    scale = scale and Scale(cut(scale.step, N), scale.skip)
    total = running_sums(g, docs and docs[0], plan.chunk)
    starts = state
    if N > 1:
        starts = _joined(_sum(k, v, total, scale, docs, plan, back=False), state, g, docs, back=False)
    sweep = shared_sweep if v.shape[2] > k.shape[2] else _sweep
    o, states, ends = sweep(q, k, v, total, scale, starts, docs, plan)
    return (join(o, N), ends[N - 1 :: N]), (q, k, v, g, total, scale, docs, states)


def _backward(plan, saved, cotangents):
    q, k, v, g, total, scale, docs, states = saved
    do, dlast = cotangents
    N = plan.segments
    out, ends = cut(do.astype(v.dtype), N), dlast
    if N > 1:
        ends = _joined(_sum(q, out, total, None, docs, plan, back=True), dlast, g, docs, back=True)
    gradients = shared_back if v.shape[2] > k.shape[2] else _sweep_back
    dq, dk, dv, change, flow, dstates, *dscale = gradients(q, k, v, total, scale, states, out, ends, docs, plan)
    dg = decay_gradient(change, flow, docs and docs[0], plan.chunk)
    dscale = Scale(join(dscale[0], N), jnp.sum(dscale[1], axis=0)) if scale is not None else None
    return *(join(x, N) for x in (dq, dk, dv, dg)), dscale, dstates[::N], None


_core: Any = jax.custom_vjp(_outputs, nondiff_argnums=(7,))
_core.defvjp(_forward, _backward)


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


def _sum(k: jax.Array, v: jax.Array, total: jax.Array, scale: Any, docs: Any, plan: Plan, back: bool) -> jax.Array:
    """What each row adds to a state [B, H, K, V]: decayed to its end; or with `back`, of queries and the outputs' gradients, to its
    beginning."""
    (B, T, heads, K), V, H, C = k.shape, v.shape[3], total.shape[2], plan.chunk
    docs, masked = documents_or_none(docs)
    n, count = T // C, v.shape[2] // H
    factors, places, scaled = scale_inputs(scale, walk_vector(T))
    kernel = partial(_sum_kernel, C=C, n=n, masked=masked, back=back, count=count, scaled=scaled)
    specs = [heads_of(T, K, heads, H), heads_of(T, V, H * count, H), walk_vector(T), *places, *whole_specs(masked, T, n)]
    outputs = [((B, H, K, V), FLOAT32, of_head(K, V))]
    return call(kernel, plan.forward, (B, H), [k, v, total, *factors, *docs], specs, outputs, together=True)[0]


def _sum_kernel(k, v, total, step, skip, documents, edges, out, *, C, n, masked, back, count, scaled):
    def body(m, S):
        i = n - 1 - m if back else m
        at = pl.ds(i * C, C)
        d = decays(total[at], total[i * C + C - 1], borders_at(C, i, documents, edges, masked))
        weight, S = (d.start if back else d.end)[:, None], d.whole * S
        for j in range(count):
            S = S + dot(k[at, j, :], (scaled_values(v[at, j, :], step, at, scaled) * weight).astype(v.dtype), turn_a=True)
        return S

    out[...] = lax.fori_loop(0, n, body, jnp.zeros(out.shape, FLOAT32))


def _sweep(q: jax.Array, k: jax.Array, v: jax.Array, total: jax.Array, scale: Any, state: jax.Array, docs: Any, plan: Plan) -> Any:
    """Outputs [B, T, H Q, V], the state before every chunk [B, H, n, K, V], the last one [B, H, K, V] float32."""
    (B, T, heads, K), (H, V), C = q.shape, v.shape[2:], plan.chunk
    docs, masked = documents_or_none(docs)
    n, count = T // C, max(1, heads // H)
    factors, places, scaled = scale_inputs(scale, walk_vector(T))
    kernel = partial(_sweep_kernel, C=C, n=n, masked=masked, count=count, scaled=scaled)
    rows = [heads_of(T, K, heads, H), heads_of(T, K, k.shape[2], H), walk(T, V), walk_vector(T)]
    outputs = [
        ((B, T, H * count, V), v.dtype, heads_of(T, V, H * count, H)),
        ((B, H, n, K, V), v.dtype, of_chunks(n, K, V)),
        ((B, H, K, V), FLOAT32, of_head(K, V)),
    ]
    specs = [*rows, *places, of_head(K, V), *whole_specs(masked, T, n)]
    return call(kernel, plan.forward, (B, H), [q, k, v, total, *factors, state, *docs], specs, outputs, together=True)


def _sweep_kernel(q, k, v, total, step, skip, state, documents, edges, o, states, last, *, C, n, masked, count, scaled):
    def body(i, S):
        at = pl.ds(i * C, C)
        key, own = k[at, 0, :], v[at, :]
        value = scaled_values(own, step, at, scaled)
        dtype = value.dtype
        d = decays(total[at], total[i * C + C - 1], borders_at(C, i, documents, edges, masked))
        small = S.astype(dtype)
        states[i] = small
        for j in range(count):
            query = q[at, j, :]
            inside = (dot(query, key, turn_b=True) * d.between).astype(dtype)
            out = dot(inside, value) + dot(query, small) * d.start[:, None]
            o[at, j, :] = (out + skip[0] * own if scaled else out).astype(o.dtype)
        return d.whole * S + dot(key, (value * d.end[:, None]).astype(dtype), turn_a=True)

    last[...] = lax.fori_loop(0, n, body, state[...])


def _sweep_back(q, k, v, total, scale, states, do, dlast, docs: Any, plan: Plan) -> Any:
    """Gradients of q, k, v, what makes that of g (tiles.decay_gradient), those of the state before the row and, if there is a scale, of it;
    one value for each key."""
    (B, T, heads, K), (H, V), C = q.shape, v.shape[2:], plan.chunk
    docs, masked = documents_or_none(docs)
    n, count = T // C, heads // H
    factors, places, scaled = scale_inputs(scale, walk_vector(T))
    kernel = partial(_sweep_back_kernel, C=C, n=n, masked=masked, count=count, scaled=scaled)
    rows = [heads_of(T, K, heads, H), walk(T, K), walk(T, V), walk_vector(T)]
    specs = [*rows, *places, of_chunks(n, K, V), heads_of(T, V, heads, H), of_head(K, V), *whole_specs(masked, T, n)]
    outputs = [
        (q.shape, q.dtype, heads_of(T, K, heads, H)),
        (k.shape, k.dtype, walk(T, K)),
        (v.shape, v.dtype, walk(T, V)),
        ((B, T, H), FLOAT32, walk_vector(T)),
        ((B, H, n, 1), FLOAT32, walk_numbers(n)),
        ((B, H, K, V), FLOAT32, of_head(K, V)),
        *scale_outputs(scaled, B, H, (B, T, H), walk_vector(T)),
    ]
    inputs = [q, k, v, total, *factors, states, do, dlast, *docs]
    return call(kernel, plan.backward, (B, H), inputs, specs, outputs, together=True)


def _sweep_back_kernel(q, k, v, total, step, skip, states, do, dlast, documents, edges, *outputs, C, n, masked, count, scaled):
    dq, dk, dv, change, flow, dstate, *dscale = outputs

    def body(m, carried):
        (dS, dskip), i = carried, n - 1 - m
        at = pl.ds(i * C, C)
        key, own, S = k[at, :], v[at, :], states[i]
        value = scaled_values(own, step, at, scaled)
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
        if scaled:
            dvalue, dskip = unscaled(dvalue, own, do[at, 0, :], step[at], skip[0], dscale[0], at, dskip)
        dv[at, :] = dvalue.astype(dv.dtype)
        return dS, dskip

    dstate[...], dskip = lax.fori_loop(0, n, body, (dlast[...], jnp.float32(0)))
    if scaled:
        dscale[1][0] = dskip
