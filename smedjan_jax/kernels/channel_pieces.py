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
    numbered,
    of_parameter,
    pair_of,
    positions,
    put_half,
    scores_of,
    split_refs,
    summed,
)
from smedjan_jax.kernels.tiles import FLOAT32, Launch, call, chunk_specs, dot, in_rows, of_chunk, only, partial, piece, piece_vector, place

APART = False  # products and rows in a kernel each: fewer registers, 10 more arrays of [B, T, H, K] to write or read
ROWS = Launch(8, 1)  # of the second


def pieces(
    raw: Arrays, parameters: Arrays, values: Arrays, tiles: Arrays, states: Arrays, dnumbers: list[jax.Array], docs: Any, how: How
) -> tuple[Arrays, Arrays]:
    """d of raw [B, T, H, K] and of parameters [H, K]. values: v, u, do, dz [B, T, H, V]; states: those before and d of those after."""
    (B, T, H, K), V, C = raw[0].shape, values[0].shape[-1], how.plan.chunk
    docs, masked = numbered(docs)
    n = T // C
    rows = [*raw, *parameters], [piece(C, K)] * len(raw) + [of_parameter(K)] * len(parameters)
    chunks = [*docs, *values, *tiles, *states]
    of_chunks = chunk_specs(masked, C, n) + [piece(C, V)] * 4 + [of_chunk(2 * C, K)] * 2 + [of_chunk(K, V)] * 2
    numbers = list(dnumbers), [piece_vector(C)] * len(dnumbers)
    outputs = [(x.shape, x.dtype, piece(C, K)) for x in raw]
    outputs += [((B, n, H, K), FLOAT32, pl.BlockSpec((None, None, None, K), lambda b, h, i: (b, i, h, 0)))] * len(parameters)
    settings: Any = {"prepare": how.prepare, "counts": (len(raw), len(parameters)), "more": how.more, "C": C}
    launch, grid = how.plan.pieces, (B, H, n)
    if APART:
        slopes = [(x.shape, x.dtype, of_chunk(2 * C, K)) for x in tiles] + [(raw[0].shape, raw[0].dtype, piece(C, K))]
        found = call(partial(_product_kernel, C=C, masked=masked), launch, grid, chunks, of_chunks, slopes, together=True)
        inputs, specs = [*rows[0], *found, *numbers[0]], [*rows[1], *(spec for *_, spec in slopes), *numbers[1]]
        found = call(partial(_row_kernel, **settings), ROWS, grid, inputs, specs, outputs, together=True)
    else:
        inputs, specs = [*rows[0], *chunks, *numbers[0]], [*rows[1], *of_chunks, *numbers[1]]
        found = call(partial(_piece_kernel, masked=masked, **settings), launch, grid, inputs, specs, outputs, together=True)
    return tuple(found[: len(raw)]), tuple(jnp.sum(x, axis=(0, 1)) for x in found[len(raw) :])


def _products(refs: Any, C: int, masked: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """d L and d N [2C, K], and the gradient of the log decays from the state that leaves, [K]."""
    documents, edges, v, u, do, dz, left, right, before, after = refs
    pair = pair_of(C, 0, documents, edges, masked, place())
    values, slopes = half_of(v, 0, C) + half_of(u, 0, C, lower=True), half_of(do, 0, C) + half_of(dz, 0, C, lower=True)
    L, N, S, dS = left[...], right[...], before[...], after[...]
    scores = scores_of(slopes, values, pair.seen)
    dL = dot(only(pair.reads, slopes), S, turn_b=True) + dot(scores, N)
    out = dot(only(pair.writes, values), dS, turn_b=True)
    flow = kept(pair.keeps, jnp.sum(S.astype(FLOAT32) * dS, axis=1)) + jnp.sum(N.astype(FLOAT32) * out, axis=0)
    return dL, out + dot(scores, L, turn_a=True), flow


def _piece_kernel(*refs, prepare, counts, more, C, masked):
    """The products come first, then the rows once more: so few tiles live at a time."""
    inputs, parameters, others = split_refs(refs, counts)
    chunk, dnumbers, gradients = others[:10], others[10 : 10 + more], others[10 + more :]
    dL, dN, flow = _products(chunk, C, masked)
    (dquery, dprobe), (dkey, drank) = jnp.split(dL, 2), jnp.split(dN, 2)
    # as they were multiplied: what is read of a document and what was added to it are one sum, to the last bit of the products
    query, probe, key, rank = (x[at, :].astype(FLOAT32) for x in chunk[6:8] for at in (pl.ds(0, C), pl.ds(C, C)))
    own = probe * dprobe
    change = query * dquery + own - key * dkey - rank * drank
    dw = in_rows(flow + jnp.sum(change, axis=0), change) - lax.cumsum(change, axis=0) + (change - own)
    f = _through_decay(inputs, parameters, dw, gradients, prepare)
    _through_rest(inputs, parameters, (dquery, dprobe, dkey, drank), f, dnumbers, gradients, prepare)


def _product_kernel(*refs, C, masked):
    """d L and d N [2C, K] and d log w [C, K]: running sums as products with a mask, which leaves all in the layout of products. What is
    read twice is loaded twice, after a store, so that no register holds it meanwhile."""
    documents, edges, v, u, do, dz, left, right, before, after, dleft, dright, dlog = refs
    pair = pair_of(C, 0, documents, edges, masked, place())
    exact = left.dtype == FLOAT32
    (row, _), (column, _) = (positions(C, (2 * C, 2 * C), axis) for axis in (0, 1))
    slopes = half_of(do, 0, C) + half_of(dz, 0, C, lower=True)
    values = half_of(v, 0, C) + half_of(u, 0, C, lower=True)
    scores = scores_of(slopes, values, pair.seen)
    dL = dot(only(pair.reads, slopes), before[...], turn_b=True) + dot(scores, right[...])
    dleft[...] = dL.astype(dleft.dtype)
    out = dot(only(pair.writes, values), after[...], turn_b=True)
    flow = jnp.sum(right[...].astype(FLOAT32) * out, axis=0)
    dN = out + dot(scores, left[...], turn_a=True)
    dright[...] = dN.astype(dright.dtype)
    reads = left[...].astype(FLOAT32) * dL
    later = summed(row <= column, reads - right[...].astype(FLOAT32) * dN, exact) - reads
    flow = flow + kept(pair.keeps, jnp.sum(before[...].astype(FLOAT32) * after[...], axis=1))
    put_half(dlog, 0, C, later + in_rows(flow, later), lower=True)


def _row_kernel(*refs, prepare, counts, more, C):
    inputs, parameters, (dleft, dright, dlog, *others) = split_refs(refs, counts)
    dnumbers, gradients = others[:more], others[more:]
    f = _through_decay(inputs, parameters, dlog[...].astype(FLOAT32), gradients, prepare)
    slopes = (x[at, :].astype(FLOAT32) for x in (dleft, dright) for at in (pl.ds(0, C), pl.ds(C, C)))
    _through_rest(inputs, parameters, slopes, f, dnumbers, gradients, prepare)


def _through_decay(inputs, parameters, dw, gradients, prepare):
    """From d log w [C, K] to gradients of what it is made of; e^G."""
    few = prepare.few
    w, pull = jax.vjp(prepare.decay, inputs[0][...].astype(FLOAT32), [x[...] for x in parameters[:few]])
    _put([gradients[0], *gradients[len(inputs) :]], pull(dw))
    return factors(w)


def _through_rest(inputs, parameters, slopes, f, dnumbers, gradients, prepare):
    """From d R, A, K, B [C, K] to gradients of what they are made of."""
    dquery, dprobe, dkey, drank = slopes
    slopes = dquery * f.up, dkey * f.down, dprobe * f.before, drank * f.down
    few = prepare.few
    _, pull = jax.vjp(prepare.rest, [x[...].astype(FLOAT32) for x in inputs[1:]], [x[...] for x in parameters[few:]])
    _put([*gradients[1 : len(inputs)], *gradients[len(inputs) + few :]], pull((*slopes, *[x[...] for x in dnumbers])))


def _put(references, gradients):
    for reference, gradient in zip(references, jax.tree.leaves(gradients), strict=False):
        reference[...] = gradient.astype(reference.dtype)
