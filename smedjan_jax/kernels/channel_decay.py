"""The delta rule with a decay for each channel, RWKV-7's, in kernels (the equations stand in mixers/rwkv.py). S is [K, V] here.

    R, A, K, B = r e^G, a e^Gx, k e^-G, b e^-G;  X = (I - below(A B^T))^-1;  U = X z,  z = A S + below(A K^T) V
    o = R S + lower(R K^T) V + lower(R B^T) U;   S' = e^G_C (S + K^T V + B^T U)

Forward: R, A, K, B and X of all chunks at once, then a sweep with S in registers, which leaves the state before each chunk. Backward: a
sweep back with dS that makes dV and dz and leaves dS after each chunk; the rest takes every chunk by itself, all at once. The log decay's
gradient is the running sum of what each channel reads more than it adds (tiles.decay_gradient), channel by channel.

Since -0.607 < log w no factor exceeds e^39 in a chunk of 64, which float32 and bfloat16 hold. Sweeps may take parts of V.

Shapes: as in tiles.py; r, log w, k, a, b [B, T, H, K], v [B, T, H, V].
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from smedjan_jax.kernels.tiles import (
    FLOAT32,
    Borders,
    DeltaPlan,
    borders_at,
    call,
    chunk_specs,
    dot,
    fill_parts,
    fitting,
    numbers,
    of_chunk,
    of_chunks,
    of_head,
    only,
    padded,
    partial,
    piece,
    power_of_two,
    sums,
    unit_lower_inverse,
    walk,
    whole_specs,
)

Arrays = tuple[jax.Array, ...]


def _plan(width: int, K: int, V: int) -> DeltaPlan:
    """What was fastest on an H100, with fewer loads in flight where shared memory would not hold them. width: bytes of a number."""
    plan = DeltaPlan(32)
    step = width * plan.chunk * (4 * K + V + plan.chunk)
    return plan._replace(forward=fitting(plan.forward, step), backward=fitting(plan.backward, step))


def dplr_delta_rule(
    arrays: Arrays, state: jax.Array, documents: jax.Array | None, plan: DeltaPlan | None = None
) -> tuple[jax.Array, jax.Array]:
    """The twin of mixers.rwkv.dplr_delta_rule: o [B, T, H, V] in the dtype of r and the float32 state [B, H, V, K].

    arrays: r, log w, k, v, a, b [B, T, H, K]; state [B, H, V, K] float32; documents [B, T].
    """
    r, w, k, v, a, b = arrays
    plan = plan or _plan(r.dtype.itemsize, power_of_two(r.shape[-1]), power_of_two(v.shape[-1]))
    (B, T, H, K), V, C = r.shape, v.shape[-1], plan.chunk
    wide_K, wide_V, size = power_of_two(K), power_of_two(V), C * -(-T // C)
    r, k, a, b, v = (padded(padded(x.astype(r.dtype), -1, power_of_two(x.shape[-1])), 1, size) for x in (r, k, a, b, v))
    w = padded(padded(w, -1, wide_K), 1, size)
    state = padded(padded(state.swapaxes(-1, -2), -1, wide_V), -2, wide_K)
    docs = None if documents is None else numbers(documents, None, size, C)
    parts = plan.parts or fill_parts(B * H, wide_V)
    o, last = _core(r, w, k, v, a, b, state, docs, plan._replace(parts=parts))
    return o[:, :T, :, :V], last[:, :, :K, :V].swapaxes(-1, -2)


def _outputs(r, w, k, v, a, b, state, docs, plan):
    return _forward(r, w, k, v, a, b, state, docs, plan)[0]


def _forward(r, w, k, v, a, b, state, docs, plan):
    tiles = _tiles(r, w, k, a, b, docs, plan)
    o, states, last = _sweep(v, tiles, state, docs, plan)
    return (o, last), (w, v, tiles, states, docs)


def _backward(plan, saved, cotangents):
    w, v, tiles, states, docs = saved
    do, dlast = cotangents
    dv, dz, after, dstate = _sweep_back(tiles, do, dlast, docs, plan)
    dr, dw, dk, da, db = _pieces(w, v, tiles, states, do, dz, after, docs, plan)
    return dr, dw, dk, dv, da, db, dstate, None


_core: Any = jax.custom_vjp(_outputs, nondiff_argnums=(8,))
_core.defvjp(_forward, _backward)


def _documents(docs: Any) -> tuple[Any, bool]:
    return (numbers(None, None, 0, 1), False) if docs is None else (docs, True)


class Factors(NamedTuple):
    """e^G and what it is made of, float32."""

    up: jax.Array  # [C, K] e^G
    before: jax.Array  # [C, K] e^Gx
    down: jax.Array  # [C, K] e^-G
    end: jax.Array  # [K] e^G at the chunk's end


def _factors(log_decay: jax.Array, borders: Borders) -> Factors:
    total = sums(borders.seen, log_decay)
    end = jnp.sum(only(borders.writes, log_decay), axis=0)
    return Factors(jnp.exp(total), jnp.exp(total - log_decay), jnp.exp(-total), jnp.exp(end))


def _scores(left: jax.Array, right: jax.Array, seen: jax.Array) -> jax.Array:
    return jnp.where(seen, dot(left, right, turn_b=True), 0.0).astype(left.dtype)


def _kept(borders: Borders, x: jax.Array) -> jax.Array:
    return x if borders.keeps is None else jnp.where(borders.keeps, x, 0.0)


def _tiles(r: jax.Array, w: jax.Array, k: jax.Array, a: jax.Array, b: jax.Array, docs: Any, plan: DeltaPlan) -> Any:
    """R, A, K, B [B, T, H, K] and X [B, H, n, C, C] in the compute dtype, e^G at the chunks' ends [B, H, n, K] float32."""
    (B, T, H, K), C = r.shape, plan.chunk
    docs, masked = _documents(docs)
    n = T // C
    kernel = partial(_tiles_kernel, C=C, masked=masked, exact=r.dtype == FLOAT32)
    outputs = [(r.shape, r.dtype, piece(C, K))] * 4 + [((B, H, n, C, C), r.dtype, of_chunk(C, C))]
    outputs += [((B, H, n, K), FLOAT32, pl.BlockSpec((None, None, None, K), lambda b, h, i: (b, h, i, 0)))]
    return call(kernel, plan.inverse, (B, H, n), [r, w, k, a, b, *docs], [piece(C, K)] * 5 + chunk_specs(masked, C, n), outputs)


def _tiles_kernel(r, w, k, a, b, documents, edges, query, probe, key, rank, x, end, *, C, masked, exact):
    borders = borders_at(C, pl.program_id(2), documents, edges, masked, whole=False)
    f, dtype = _factors(w[...], borders), r.dtype
    query[...], key[...] = (r[...] * f.up).astype(dtype), (k[...] * f.down).astype(dtype)
    left, right = (a[...] * f.before).astype(dtype), (b[...] * f.down).astype(dtype)
    probe[...], rank[...], end[...] = left, right, f.end
    m = jnp.where(borders.below, -dot(left, right, turn_b=True), 0.0)
    x[...] = unit_lower_inverse(m, exact).astype(dtype)


def _walks(T: int, K: int, C: int) -> list[pl.BlockSpec]:
    """Of what `_tiles` gives, for programs that walk."""
    n = T // C
    return [walk(T, K)] * 4 + [of_chunks(n, C, C), of_head(n, K)]


def _sweep(v: jax.Array, tiles: Any, state: jax.Array, docs: Any, plan: DeltaPlan) -> Any:
    """Outputs [B, T, H, V], the state before every chunk [B, H, n, K, V], the last one [B, H, K, V] float32."""
    (B, T, H, V), K, C, parts = v.shape, tiles[0].shape[-1], plan.chunk, plan.parts
    docs, masked = _documents(docs)
    n = T // C
    specs = [walk(T, V, parts), *_walks(T, K, C), of_head(K, V, parts), *whole_specs(masked, T, n)]
    outputs = [
        (v.shape, v.dtype, walk(T, V, parts)),
        ((B, H, n, K, V), v.dtype, of_chunks(n, K, V, parts)),
        ((B, H, K, V), FLOAT32, of_head(K, V, parts)),
    ]
    kernel = partial(_sweep_kernel, C=C, n=n, masked=masked)
    return call(kernel, plan.forward, (B, H, parts), [v, *tiles, state, *docs], specs, outputs)


def _sweep_kernel(v, r, a, k, b, x, end, state, documents, edges, o, states, last, *, C, n, masked):
    def body(i, S):
        at = pl.ds(i * C, C)
        borders = borders_at(C, i, documents, edges, masked)
        value, query, probe, key, rank = v[at, :], r[at, :], a[at, :], k[at, :], b[at, :]
        dtype, small = value.dtype, S.astype(value.dtype)
        states[i] = small
        z = dot(only(borders.reads, probe), small) + dot(_scores(probe, key, borders.below), value)
        u = dot(x[i], z.astype(dtype)).astype(dtype)
        out = dot(only(borders.reads, query), small) + dot(_scores(query, key, borders.seen), value)
        o[at, :] = (out + dot(_scores(query, rank, borders.seen), u)).astype(o.dtype)
        key, rank = only(borders.writes, key), only(borders.writes, rank)
        return end[i, :][:, None] * (_kept(borders, S) + dot(key, value, turn_a=True) + dot(rank, u, turn_a=True))

    last[...] = lax.fori_loop(0, n, body, state[...])


def _sweep_back(tiles: Any, do: jax.Array, dlast: jax.Array, docs: Any, plan: DeltaPlan) -> Any:
    """d v and d z [B, T, H, V], d of what is decayed into the state after every chunk [B, H, n, K, V], d of the first state float32."""
    (B, T, H, V), K, C, parts = do.shape, tiles[0].shape[-1], plan.chunk, plan.parts
    docs, masked = _documents(docs)
    n = T // C
    specs = [*_walks(T, K, C), walk(T, V, parts), of_head(K, V, parts), *whole_specs(masked, T, n)]
    outputs = [
        *[(do.shape, do.dtype, walk(T, V, parts))] * 2,
        ((B, H, n, K, V), do.dtype, of_chunks(n, K, V, parts)),
        ((B, H, K, V), FLOAT32, of_head(K, V, parts)),
    ]
    kernel = partial(_sweep_back_kernel, C=C, n=n, masked=masked)
    return call(kernel, plan.backward, (B, H, parts), [*tiles, do, dlast, *docs], specs, outputs)


def _sweep_back_kernel(r, a, k, b, x, end, do, dlast, documents, edges, dv, dz, after, dstate, *, C, n, masked):
    def body(m, dS):
        i = n - 1 - m
        at = pl.ds(i * C, C)
        borders = borders_at(C, i, documents, edges, masked)
        out, query, probe, key, rank = do[at, :], r[at, :], a[at, :], k[at, :], b[at, :]
        dtype, dS = out.dtype, end[i, :][:, None] * dS
        small = dS.astype(dtype)
        after[i] = small
        du = dot(_scores(query, rank, borders.seen), out, turn_a=True) + dot(only(borders.writes, rank), small)
        slope = dot(x[i], du.astype(dtype), turn_a=True).astype(dtype)
        dz[at, :] = slope
        dvalue = dot(_scores(query, key, borders.seen), out, turn_a=True) + dot(only(borders.writes, key), small)
        dv[at, :] = (dvalue + dot(_scores(probe, key, borders.below), slope, turn_a=True)).astype(dtype)
        read = dot(only(borders.reads, query), out, turn_a=True) + dot(only(borders.reads, probe), slope, turn_a=True)
        return _kept(borders, dS) + read

    dstate[...] = lax.fori_loop(0, n, body, dlast[...])


def _pieces(w: jax.Array, v: jax.Array, tiles: Any, states: jax.Array, do, dz, after, docs: Any, plan: DeltaPlan) -> Any:
    """d of r, log w, k, a, b [B, T, H, K]."""
    (B, T, H, K), V, C = w.shape, v.shape[-1], plan.chunk
    docs, masked = _documents(docs)
    n = T // C
    specs = [piece(C, K), piece(C, V), *[piece(C, K)] * 4, of_chunk(C, C), of_chunk(K, V), piece(C, V), piece(C, V), of_chunk(K, V)]
    narrow, wide = (w.shape, v.dtype, piece(C, K)), (w.shape, FLOAT32, piece(C, K))
    kernel = partial(_piece_kernel, C=C, masked=masked)
    inputs = [w, v, *tiles[:5], states, do, dz, after, *docs]
    return call(kernel, plan.pieces, (B, H, n), inputs, specs + chunk_specs(masked, C, n), [narrow, wide, narrow, narrow, narrow])


def _piece_kernel(w, v, r, a, k, b, x, states, do, dz, after, documents, edges, dr, dw, dk, da, db, *, C, masked):
    borders = borders_at(C, pl.program_id(2), documents, edges, masked, whole=False)
    f, value, S, dS, out, slope = _factors(w[...], borders), v[...], states[...], after[...], do[...], dz[...]
    query, probe, key, rank, dtype = r[...], a[...], k[...], b[...], v.dtype
    z = only(borders.reads, dot(probe, S)) + dot(_scores(probe, key, borders.below), value)
    u = dot(x[...], z.astype(dtype)).astype(dtype)
    out_value, out_u = _scores(out, value, borders.seen), _scores(out, u, borders.seen)
    dquery = only(borders.reads, dot(out, S, turn_b=True)) + dot(out_value, key) + dot(out_u, rank)
    dr[...], change = (dquery * f.up).astype(dtype), query * dquery
    slope_value, slope_u = _scores(slope, value, borders.below), _scores(slope, u, borders.below)
    dprobe = only(borders.reads, dot(slope, S, turn_b=True)) + dot(slope_value, key) + dot(slope_u, rank)
    da[...], own = (dprobe * f.before).astype(dtype), probe * dprobe
    flow = _kept(borders, jnp.sum(S.astype(FLOAT32) * dS, axis=1))
    key_out = only(borders.writes, dot(value, dS, turn_b=True))
    dkey = key_out + dot(out_value, query, turn_a=True) + dot(slope_value, probe, turn_a=True)
    dk[...], flow, change = (dkey * f.down).astype(dtype), flow + jnp.sum(key * key_out, axis=0), change - key * dkey
    rank_out = only(borders.writes, dot(u, dS, turn_b=True))
    drank = rank_out + dot(out_u, query, turn_a=True) + dot(slope_u, probe, turn_a=True)
    db[...], flow, change = (drank * f.down).astype(dtype), flow + jnp.sum(rank * rank_out, axis=0), change - rank * drank
    flows = jnp.broadcast_to(flow[None, :], own.shape)
    dw[...] = sums(borders.seen, change + own, turn=True) - own + only(borders.writes, flows)
