"""The delta rule with a decay for each channel, RWKV-7's, in kernels (the equations stand in mixers/rwkv.py). S is [K, V] here.

    R, A, K, B = r e^G, a e^Gx, k e^-G, b e^-G;  X = (I - below(A B^T))^-1;  U = X z,  z = A S + below(A K^T) V
    o = R S + lower(R K^T) V + lower(R B^T) U;   S' = e^G_C (S + K^T V + B^T U)

r, log w, k, a and b are made of what the projections give in the kernels themselves, by a function of rows (`prepare`), and its gradients
are taken there too: none of them is ever written. R stands over A in one tile, L, and K over B in another, N, so that one product L N^T
gives all four matrices of scores, and one more what both take of a state: tiles are twice as high as a chunk.

Forward: L and N of all chunks at once, and of them X (216 us a layer of medium on an H200; one kernel for both held so much that few
programs ran at a time: 394), then a sweep with S in registers, which leaves U and the state before each chunk. Backward: a sweep back with
dS that makes dV and dz and leaves dS after each chunk; the rest takes every chunk by itself, all at once. The log decay's gradient is the
running sum of what each channel reads more than it adds (tiles.decay_gradient), channel by channel.

Where heads and rows are far too few to fill the GPU a sequence is cut into N segments, as in delta_rule.py (segments.py,
channel_segments.py).

Since -0.607 < log w no factor exceeds e^39 in a chunk of 64, which float32 and bfloat16 hold. Sweeps may take parts of V.

Shapes: as in tiles.py; r, log w, k, a, b [B, T, H, K], v [B, T, H, V]; tiles L and N [2C, K] of a chunk.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from smedjan_jax.kernels.channel_pieces import pieces
from smedjan_jax.kernels.channel_segments import summaries, summaries_back, walks
from smedjan_jax.kernels.channel_tiles import (
    Arrays,
    How,
    Prepare,
    corner_of,
    factors,
    half_of,
    kept,
    of_parameter,
    pair_of,
    put_half,
    put_last,
    scores_of,
    split_refs,
)
from smedjan_jax.kernels.segments import cut, join, joined, segment_documents, segments_that_pay
from smedjan_jax.kernels.special import wide
from smedjan_jax.kernels.tiles import (
    FLOAT32,
    SMALLEST,
    DeltaPlan,
    Launch,
    call,
    chunk_specs,
    documents_or_none,
    dot,
    fill_parts,
    fitting,
    in_rows,
    of_chunk,
    of_chunks,
    of_head,
    only,
    padded,
    partial,
    piece,
    piece_vector,
    power_of_two,
    product,
    unit_lower_inverse,
    walk,
    whole_specs,
)


def _plan(width: int, K: int, V: int) -> DeltaPlan:
    """What was fastest on an H200 in bfloat16 with heads of 64, with fewer loads in flight where shared memory would not hold them. Larger
    heads and float32, which nobody timed, have what spills least. width: bytes of a number."""
    plan = DeltaPlan(32) if width == 2 else DeltaPlan(16, forward=Launch(4, 2), backward=Launch(4, 2))
    if K > 64:
        plan = plan._replace(tiles=Launch(8, 1), pieces=Launch(8, 1))
    step = width * plan.chunk * (4 * K + 2 * V + 4 * plan.chunk)
    return plan._replace(forward=fitting(plan.forward, step), backward=fitting(plan.backward, step))


GIVEN = Prepare(lambda row, _: row, lambda rows, _: tuple(rows))


def dplr_delta_rule(
    arrays: Arrays, state: jax.Array, documents: jax.Array | None, plan: DeltaPlan | None = None
) -> tuple[jax.Array, jax.Array]:
    """The twin of mixers.rwkv.dplr_delta_rule: o [B, T, H, V] in the dtype of r and the float32 state [B, H, V, K].

    arrays: r, log w, k, v, a, b [B, T, H, K]; state [B, H, V, K] float32; documents [B, T].
    """
    r, w, k, v, a, b = arrays
    raw = (w, r, *(x.astype(r.dtype) for x in (k, a, b)))
    o, last, _ = _run(raw, (), v.astype(r.dtype), state, documents, GIVEN, 0, plan)
    return o, last


def prepared_delta_rule(
    raw: Arrays, parameters: Arrays, v: jax.Array, documents: jax.Array | None, prepare: Prepare, plan: DeltaPlan | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same from an empty state, of what `prepare` makes r, log w, k, a, b of: o, a number of each row [B, T, H] float32, v again.

    raw [B, T, H, K], the decay's first, and v [B, T, H, V] in one dtype, parameters [H, K] float32. The number is the last that `prepare`
    gives. v comes back so that what it is needed for later adds to its gradient inside of the kernel.
    """
    B, _, H, K = raw[0].shape
    o, _, (number, v) = _run(raw, parameters, v, jnp.zeros((B, H, v.shape[-1], K), FLOAT32), documents, prepare, 1, plan)
    return o, number, v


def _run(raw, parameters, v, state, documents, prepare, more, plan):
    """o, the last state, and the row's numbers and v where there are more."""
    plan = plan or _plan(v.dtype.itemsize, power_of_two(raw[0].shape[-1]), power_of_two(v.shape[-1]))
    (B, T, H, K), V, C = raw[0].shape, v.shape[-1], plan.chunk
    wide_K, wide_V, N = power_of_two(K), power_of_two(V), plan.segments or segments_that_pay(B * H, T)
    size = N * C * -(-T // (N * C))
    raw = tuple(cut(padded(padded(x, -1, wide_K), 1, size), N) for x in raw)
    small = tuple(padded(p.astype(FLOAT32), -1, wide_K) for p in parameters)
    wide_v = cut(padded(padded(v, -1, wide_V), 1, size), N)
    state = padded(padded(state.swapaxes(-1, -2), -1, wide_V), -2, wide_K)
    docs = segment_documents(documents, size, N, C)
    parts = plan.parts or max(fill_parts(B * H * N, wide_V), wide_V // 64)  # with more than 64 columns of a state a program spills
    how = How(prepare, more, plan._replace(parts=parts, segments=N))
    o, last, *others = _core(raw, small, wide_v, state, docs, how)
    o, *others = (join(x, N)[:, :T] for x in (o, *others))
    return o[..., :V], last[:, :, :K, :V].swapaxes(-1, -2), [x if x.ndim == 3 else x[..., :V] for x in others]


def _outputs(raw, parameters, v, state, docs, how):
    return _forward(raw, parameters, v, state, docs, how)[0]


def _forward(raw, parameters, v, state, docs, how):
    """raw and v [B N, T / N, H, K or V], docs of segments; state [B, H, K, V]."""
    *tiles, number = _tiles(raw, parameters, v.dtype, docs, how)
    N, whole, starts = how.plan.segments, None, state
    if N > 1:
        own, whole = summaries(v, tiles, docs, how.plan)
        starts = joined(own, whole, state, N)
    o, u, states, ends = _sweep(v, tiles, starts, docs, how.plan)
    return (o, ends[N - 1 :: N], *number, *([v] if how.more else [])), (raw, parameters, v, u, tiles, states, whole, docs)


def _backward(how, saved, cotangents):
    raw, parameters, v, u, tiles, states, whole, docs = saved
    (do, dlast, *others), N = cotangents, how.plan.segments
    ends = dlast if whole is None else joined(summaries_back(do, tiles, docs, how.plan), whole, dlast, N, back=True)
    dv, dz, after, dstates = _sweep_back(tiles, do, others[1:], ends, docs, how.plan)
    draw, dparameters = pieces(raw, parameters, (v, u, do, dz), tiles[:2], (states, after), others[:1], docs, how)
    return draw, dparameters, dv, dstates[::N], None


_core: Any = jax.custom_vjp(_outputs, nondiff_argnums=(5,))
_core.defvjp(_forward, _backward)


def _tiles(raw: Arrays, parameters: Arrays, dtype: Any, docs: Any, how: How) -> Any:
    """L, N [B, H, n, 2C, K] and X [B, H, n, C, C] in the compute dtype, e^G at the chunks' ends [B, H, n, K] float32; a list of the rows'
    numbers."""
    (B, T, H, K), C = raw[0].shape, how.plan.chunk
    n = T // C
    kernel = partial(_tiles_kernel, prepare=how.prepare, counts=(len(raw), len(parameters)), C=C)
    outputs = [((B, H, n, 2 * C, K), dtype, of_chunk(2 * C, K))] * 2
    outputs += [((B, H, n, K), FLOAT32, pl.BlockSpec((None, None, None, K), lambda b, h, i: (b, h, i, 0)))]
    outputs += [((B, T, H), FLOAT32, piece_vector(C))] * how.more
    specs = [piece(C, K)] * len(raw) + [of_parameter(K)] * len(parameters)
    left, right, end, *numbers = call(kernel, how.plan.tiles, (B, H, n), [*raw, *parameters], specs, outputs, together=True)
    docs, masked = documents_or_none(docs)
    kernel = partial(_inverse_kernel, C=C, masked=masked, exact=dtype == FLOAT32)
    specs = [of_chunk(2 * C, K)] * 2 + chunk_specs(masked, C, n)
    (x,) = call(kernel, how.plan.inverse, (B, H, n), [left, right, *docs], specs, [((B, H, n, C, C), dtype, of_chunk(C, C))])
    return left, right, x, end, numbers


def _tiles_kernel(*refs, prepare, counts, C):
    inputs, parameters, (left, right, end, *numbers) = split_refs(refs, counts)
    dtype, (row, *rows) = left.dtype, [wide(each[...]) for each in inputs]
    small = [in_rows(each[...], row) for each in parameters]
    w, (r, k, a, b, *more) = prepare.decay(row, small[: prepare.few]), prepare.rest(rows, small[prepare.few :])
    f, upper, lower = factors(w), pl.ds(0, C), pl.ds(C, C)
    left[upper, :], left[lower, :] = (r * f.up).astype(dtype), (a * f.before).astype(dtype)
    right[upper, :], right[lower, :] = (k * f.down).astype(dtype), (b * f.down).astype(dtype)
    put_last(end, f.up)
    for out, number in zip(numbers, more, strict=True):
        out[...] = number


def _inverse_kernel(left, right, documents, edges, x, *, C, masked, exact):
    """X by blocks of few rows: those on the diagonal by doubling."""
    size, found = SMALLEST, {}
    parts = [pl.ds(start, size) for start in range(0, C, size)]
    probes, ranks = ([side[pl.ds(C + start, size), :] for start in range(0, C, size)] for side in (left, right))

    def matrix(i, j):
        """The block of -A B^T below the diagonal of parts i and j <= i."""
        row, column = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
        seen = row > column if i == j else None
        if masked:
            same = documents[parts[i]][:, None] == documents[parts[j]][None, :]
            seen = same if seen is None else seen & same
        m = -dot(probes[i], ranks[j], turn_b=True)
        return m if seen is None else jnp.where(seen, m, 0.0)

    for i in range(len(parts)):
        found[i, i] = unit_lower_inverse(matrix(i, i), exact)
        for j in range(i):
            between = product(matrix(i, j), found[j, j], exact)
            for m in range(j + 1, i):
                between = between + product(matrix(i, m), found[m, j], exact)
            found[i, j] = -product(found[i, i], between, exact)
        for j in range(len(parts)):
            x[parts[i], parts[j]] = (found[i, j] if j <= i else jnp.zeros((size, size), FLOAT32)).astype(x.dtype)


def _sweep(v: jax.Array, tiles: Any, state: jax.Array, docs: Any, plan: DeltaPlan) -> Any:
    """Outputs and U [B, T, H, V], the state before every chunk [B, H, n, K, V], the last one [B, H, K, V] float32."""
    (B, T, H, V), K, C, parts = v.shape, tiles[0].shape[-1], plan.chunk, plan.parts
    docs, masked = documents_or_none(docs)
    n = T // C
    specs = [walk(T, V, parts), *walks(n, K, C), of_head(K, V, parts), *whole_specs(masked, T, n)]
    outputs = [
        *[(v.shape, v.dtype, walk(T, V, parts))] * 2,
        ((B, H, n, K, V), v.dtype, of_chunks(n, K, V, parts)),
        ((B, H, K, V), FLOAT32, of_head(K, V, parts)),
    ]
    kernel = partial(_sweep_kernel, C=C, n=n, masked=masked)
    return call(kernel, plan.forward, (B, H, parts), [v, *tiles, state, *docs], specs, outputs, together=True)


def _sweep_kernel(v, left, right, x, end, state, documents, edges, o, u, states, last, *, C, n, masked):
    def body(i, carry):
        S, decay = carry
        following = end[jnp.minimum(i + 1, n - 1), :]  # a step ahead: only what products take is loaded in time by itself
        pair = pair_of(C, i, documents, edges, masked)
        L, N, value = left[i], right[i], half_of(v, i * C, C)
        dtype, small = value.dtype, S.astype(value.dtype)
        states[i] = small
        scores = scores_of(L, N, pair.seen)
        both = dot(scores, value) + dot(only(pair.reads, L), small)  # of R and, below, z
        below = dot(corner_of(x, i, C), both.astype(dtype)).astype(dtype)
        put_half(u, i * C, C, below, lower=True)
        put_half(o, i * C, C, both + dot(scores, below))
        S = kept(pair.keeps, S) + dot(only(pair.writes, N), value + below, turn_a=True)
        return decay[:, None] * S, following

    last[...], _ = lax.fori_loop(0, n, body, (state[...], end[0, :]))


def _sweep_back(tiles: Any, do: jax.Array, through: list[jax.Array], dlast: jax.Array, docs: Any, plan: DeltaPlan) -> Any:
    """d v, with `through` added, and d z [B, T, H, V], d of what is decayed into the state after every chunk [B, H, n, K, V], d of the
    first state float32."""
    (B, T, H, V), K, C, parts = do.shape, tiles[0].shape[-1], plan.chunk, plan.parts
    docs, masked = documents_or_none(docs)
    n = T // C
    specs = [*walks(n, K, C), of_head(K, V, parts), *whole_specs(masked, T, n), *[walk(T, V, parts)] * (1 + len(through))]
    outputs = [
        *[(do.shape, do.dtype, walk(T, V, parts))] * 2,
        ((B, H, n, K, V), do.dtype, of_chunks(n, K, V, parts)),
        ((B, H, K, V), FLOAT32, of_head(K, V, parts)),
    ]
    kernel = partial(_sweep_back_kernel, C=C, n=n, masked=masked)
    return call(kernel, plan.backward, (B, H, parts), [*tiles, dlast, *docs, do, *through], specs, outputs, together=True)


def _sweep_back_kernel(left, right, x, end, dlast, documents, edges, do, *refs, C, n, masked):
    *through, dv, dz, after, dstate = refs

    def body(m, carry):
        dS, decay = carry
        i = n - 1 - m
        following, added = end[jnp.maximum(i - 1, 0), :], [half_of(more, i * C, C) for more in through]  # early, as in the sweep
        pair = pair_of(C, i, documents, edges, masked)
        L, N, out = left[i], right[i], half_of(do, i * C, C)
        dtype, dS = out.dtype, decay[:, None] * dS
        small = dS.astype(dtype)
        after[i] = small
        scores = scores_of(L, N, pair.seen)
        both = dot(scores, out, turn_a=True) + dot(only(pair.writes, N), small)  # of v and, below, of u
        slope = dot(corner_of(x, i, C), both.astype(dtype), turn_a=True).astype(dtype)
        put_half(dz, i * C, C, slope, lower=True)
        dvalue = both + dot(scores, slope, turn_a=True)
        put_half(dv, i * C, C, sum((more.astype(FLOAT32) for more in added), dvalue))
        return kept(pair.keeps, dS) + dot(only(pair.reads, L), out + slope, turn_a=True), following

    dstate[...], _ = lax.fori_loop(0, n, body, (dlast[...], end[n - 1, :]))
