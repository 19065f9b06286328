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
    rows = [*raw, *parameters], [piece(C, K)] * len(raw) + [of_parameter(K)] * len(parameters)
    chunks = [*docs, *values, *tiles, *states]
    of_chunks = chunk_specs(masked, C, n) + [piece(C, V)] * 4 + [of_chunk(2 * C, K)] * 2 + [of_chunk(K, V)] * 2
    numbers = list(dnumbers), [piece_vector(C)] * len(dnumbers)
    outputs = [(x.shape, x.dtype, piece(C, K)) for x in raw]
    outputs += [((B, n, H, K), FLOAT32, pl.BlockSpec((None, None, None, K), lambda b, h, i: (b, i, h, 0)))] * len(parameters)
    settings: Any = {"prepare": how.prepare, "counts": (len(raw), len(parameters)), "more": how.more, "C": C}
    inputs, specs = [*rows[0], *chunks, *numbers[0]], [*rows[1], *of_chunks, *numbers[1]]
    kernel = partial(_piece_kernel, masked=masked, **settings)
    found = call(kernel, how.plan.pieces, (B, H, n), inputs, specs, outputs, together=True)
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
    """The products come first, then the rows once more: so few tiles live at a time. Two kernels, with fewer registers each, took 868 us
    where this one takes 703 (a layer of medium on an H200)."""
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
