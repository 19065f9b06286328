"""The gradients of r, log w, k, a and b of the delta rule with a decay for each channel, every chunk by itself (channel_decay.py).

The log decay's gradient is the running sum of what each channel reads more than it adds (tiles.decay_gradient), channel by channel.

Shapes: as in channel_decay.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from smedjan_jax.kernels.channel_tiles import (
    Arrays,
    How,
    factors,
    half_of,
    kept,
    of_parameter,
    pair_of,
    scores_of,
    split_refs,
)
from smedjan_jax.kernels.special import wide
from smedjan_jax.kernels.tiles import (
    FLOAT32,
    call,
    chunk_specs,
    documents_or_none,
    dot,
    in_rows,
    of_chunk,
    only,
    partial,
    piece,
    piece_vector,
    place,
)


def pieces(
    raw: Arrays, parameters: Arrays, values: Arrays, tiles: Arrays, states: Arrays, dnumbers: list[jax.Array], docs: Any, how: How
) -> tuple[Arrays, Arrays]:
    """d of raw [B, T, H, K] and of parameters [H, K]. values: v, u, do, dz [B, T, H, V]; states: those before and d of those after."""
    (B, T, H, K), V, C = raw[0].shape, values[0].shape[-1], how.plan.chunk
    docs, masked = documents_or_none(docs)
    n = T // C
    few = len(parameters)
    rows = [*raw, *parameters], [piece(C, K)] * len(raw) + [of_parameter(K)] * few
    chunks = [*docs, *values, *tiles, *states]
    of_chunks = chunk_specs(masked, C, n) + [piece(C, V)] * 4 + [of_chunk(2 * C, K)] * 2 + [of_chunk(K, V)] * 2
    numbers = list(dnumbers), [piece_vector(C)] * len(dnumbers)
    outputs = [(x.shape, x.dtype, piece(C, K)) for x in raw]
    outputs += [((B, n, few, H, K), FLOAT32, pl.BlockSpec((None, None, few, None, K), lambda b, h, i: (b, i, 0, h, 0)))] * bool(few)
    settings: Any = {"prepare": how.prepare, "counts": (len(raw), len(parameters)), "more": how.more, "C": C}
    inputs, specs = [*rows[0], *chunks, *numbers[0]], [*rows[1], *of_chunks, *numbers[1]]
    kernel = partial(_piece_kernel, masked=masked, **settings)
    found = call(kernel, how.plan.pieces, (B, H, n), inputs, specs, outputs, together=True)
    return tuple(found[: len(raw)]), tuple(jnp.sum(found[-1], axis=(0, 1))) if few else ()


def _products(v, u, do, dz, L, N, S, dS, pair, C):
    """d L and d N [2C, K], and the gradient of the log decays from the state that leaves, [K]."""
    values, slopes = half_of(v, 0, C) + half_of(u, 0, C, lower=True), half_of(do, 0, C) + half_of(dz, 0, C, lower=True)
    scores = scores_of(slopes, values, pair.seen)
    dL = dot(only(pair.reads, slopes), S, turn_b=True) + dot(scores, N)
    out = dot(only(pair.writes, values), dS, turn_b=True)
    flow = kept(pair.keeps, jnp.sum(S.astype(FLOAT32) * dS, axis=1)) + jnp.sum(wide(N) * out, axis=0)
    return dL, out + dot(scores, L, turn_a=True), flow


def _piece_kernel(*refs, prepare, counts, more, C, masked):
    """The products come first, then the rows once more: so few tiles live at a time. In two kernels, when rows took more
    instructions, that was 868 us in place of 703 (a layer of medium on an H200)."""
    inputs, parameters, (documents, edges, v, u, do, dz, left, right, before, after, *others) = split_refs(refs, counts)
    dnumbers, gradients = others[:more], others[more:]
    few = prepare.few
    pair = pair_of(C, 0, documents, edges, masked, place())
    dL, dN, flow = _products(v, u, do, dz, left[...], right[...], before[...], after[...], pair, C)
    (dquery, dprobe), (dkey, drank) = jnp.split(dL, 2), jnp.split(dN, 2)
    # as they were multiplied: what is read of a document and what was added to it are one sum, to the last bit of the products
    query, probe, key, rank = (x[at, :].astype(FLOAT32) for x in (left, right) for at in (pl.ds(0, C), pl.ds(C, C)))
    own = probe * dprobe
    change = query * dquery + own - key * dkey - rank * drank
    dw = in_rows(flow + jnp.sum(change, axis=0), change) - lax.cumsum(change, axis=0) + (change - own)
    row, *rows = (wide(x[...]) for x in inputs)
    small = [in_rows(x[...], row) for x in parameters]
    w, pull = jax.vjp(prepare.decay, row, small[:few])
    drow, of_decay = pull(dw)
    f = factors(w)
    _, pull = jax.vjp(prepare.rest, rows, small[few:])
    slopes = dquery * f.up, dkey * f.down, dprobe * f.before, drank * f.down
    drows, of_rest = pull((*slopes, *[x[...] for x in dnumbers]))
    for out, gradient in zip(gradients, [drow, *drows], strict=False):
        out[...] = gradient.astype(out.dtype)
    for m, gradient in enumerate([*of_decay, *of_rest]):
        gradients[-1][m, :] = jnp.sum(gradient, axis=0)
