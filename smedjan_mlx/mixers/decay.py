"""The core of mixers with one decay per head and position: linear attention, RetNet, Mamba-2 (Dao & Gu, 2024; Yang et al., 2024).

    S_t = e^{g_t} S_{t-1} + k_t v_t^T        o_t = S_t^T q_t        g <= 0

In chunks of C positions, with c the sum of g from the chunk's beginning and L_ij = e^{c_i - c_j} for i >= j, else 0:

    O = ((Q K^T) * L) V + (Q S) * e^c        S <- e^{c_C} S + K^T (V * e^{c_C - c})

No exponent is positive, and the exponents of what is masked are -inf before exp, so that gradients stay finite. All chunks are
computed at once; the states between them come from products of the same kind, one level up: chunks of chunks.

Matmuls take operands in the dtype of the arguments and sum in float32 (MLX rounds sums of bfloat16 to bfloat16); decays and states
are float32. The backward pass recomputes everything from the arguments, so what a layer keeps does not depend on the chunks.

Shapes: B batch, T positions, n chunks, G keys per position, Q queries and R values (with a decay each) per key, K, V features.
"""

import mlx.core as mx

from smedjan_mlx.mixers.chunks import into_chunks

SPAN = 32  # chunks whose states come from one product


def scalar_decay(
    query: mx.array,
    key: mx.array,
    value: mx.array,
    log_decay: mx.array,
    chunk_size: int,
    state: mx.array | None = None,
    documents: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Outputs [B, T, G, Q, R, V] and the state after the last position [B, G, R, K, V], both float32.

    query [B, T, G, Q, K], key [B, T, G, K], value [B, T, G, R, V], log_decay [B, T, G, R] float32, not positive. state: what
    came before, of the first position's document; None: nothing. documents: int32 [B, T], never falling along a row; every
    document starts with an empty state.
    """
    B, T = key.shape[:2]
    if T == 1 and state is not None and documents is None:
        return _one(query, key, value, log_decay, state)
    C = min(chunk_size, T)
    documents = None if documents is None else into_chunks(documents, C, edge=True)
    arrays = tuple(into_chunks(array, C) for array in (query, key, value, log_decay))
    out, after = mx.checkpoint(lambda arrays, state: _chunked(arrays, state, documents))(arrays, state)
    return out.reshape(B, -1, *out.shape[3:])[:, :T], after


def _one(query: mx.array, key: mx.array, value: mx.array, log_decay: mx.array, state: mx.array) -> tuple[mx.array, mx.array]:
    """One position, by the recurrence as it stands: the state is read and written once."""
    query, key, value = (array[:, 0].astype(mx.float32) for array in (query, key, value))
    state = state * mx.exp(log_decay[:, 0])[..., None, None] + key[:, :, None, :, None] * value[:, :, :, None, :]
    out = mx.sum(query[:, :, :, None, :, None] * state[:, :, None], axis=-2)
    return out[:, None], state


def _chunked(arrays: tuple[mx.array, ...], state: mx.array | None, documents: mx.array | None) -> tuple[mx.array, mx.array]:
    query, key, value, log_decay = arrays
    C, dtype = key.shape[2], value.dtype
    seen, steps = mx.tril(mx.ones((C, C), dtype=mx.bool_)), log_decay.transpose(0, 1, 3, 4, 2)
    sums, owner, ends, carries = mx.cumsum(steps, axis=-1), None, mx.array(True), mx.array(True)
    if documents is not None:
        owner = mx.concatenate([documents[:, :1, 0], documents[:, :, -1]], axis=1)  # of the state before the chunks, after each
        seen = seen & (documents[..., :, None] == documents[..., None, :])[:, :, None, None]
        ends = (documents == owner[:, 1:, None])[:, :, None, None]
        carries = (documents == owner[:, :-1, None])[:, :, None, None]
        sums = mx.where(seen, steps[..., None, :], 0.0).sum(-1)  # from the document's beginning: not one bit comes from another

    left = _exp(sums[..., -1:] - sums, ends)  # of each position, at the chunk's end
    kept = (value.astype(mx.float32) * left.transpose(0, 1, 4, 2, 3)[..., None]).astype(dtype)
    before, after = _states(_einsum("bnjgk,bnjgrv->bngrkv", key, kept), sums[..., -1], owner, state)

    decay = _exp(sums[..., :, None] - sums[..., None, :], seen)
    scores = _einsum("bnigqk,bnjgk->bngqij", query, key)
    weights = (scores[:, :, :, :, None] * decay[:, :, :, None]).astype(dtype)
    within = _einsum("bngqrij,bnjgrv->bnigqrv", weights, value)
    earlier = _einsum("bnigqk,bngrkv->bnigqrv", query, before.astype(dtype))
    return within + earlier * _exp(sums, carries).transpose(0, 1, 4, 2, 3)[:, :, :, :, None, :, None], after


def _states(update: mx.array, log_decay: mx.array, owner: mx.array | None, state: mx.array | None) -> tuple[mx.array, mx.array]:
    """The states before each of n chunks [B, n, G, R, K, V], and after the last [B, G, R, K, V].

    update [B, n, G, R, K, V]: what a chunk adds; log_decay [B, n, G, R]: what it leaves of the state before it; owner [B, n + 1]:
    the documents of the state that came in, and of each chunk's last position.
    """
    B, n = update.shape[:2]
    if n <= SPAN:
        return _span(update, log_decay, owner, state)
    update, log_decay = _spans(update), _spans(log_decay)
    inside = None
    if owner is not None:
        inside = into_chunks(owner[:, 1:], SPAN, edge=True)
        owner = mx.concatenate([owner[:, :1], inside[:, :, -1]], axis=1)
        inside = mx.concatenate([owner[:, :-1, None], inside], axis=2).reshape(-1, SPAN + 1)
    ends = _span(update, log_decay, inside, None)[1]
    starts, after = _states(ends.reshape(B, -1, *ends.shape[1:]), log_decay.sum(1).reshape(B, -1, *log_decay.shape[2:]), owner, state)
    before = _span(update, log_decay, inside, starts.reshape(ends.shape))[0]
    return before.reshape(B, -1, *before.shape[2:])[:, :n], after


def _spans(array: mx.array) -> mx.array:
    """[B, n, ...] -> [B * spans, SPAN, ...], filled up with zeros."""
    return into_chunks(array, SPAN).reshape(-1, SPAN, *array.shape[2:])


def _span(update: mx.array, log_decay: mx.array, owner: mx.array | None, state: mx.array | None) -> tuple[mx.array, mx.array]:
    """_states for few chunks, by one product."""
    n = update.shape[1]
    later = mx.tril(mx.ones((n + 1, n + 1), dtype=mx.bool_), -1)
    # sum over (d, i], added up and not subtracted: over many chunks the difference of two sums would lose digits
    steps = mx.pad(log_decay, [(0, 0), (1, 0), (0, 0), (0, 0)]).transpose(0, 2, 3, 1)
    sums = mx.cumsum(mx.where(later, steps[..., None], 0.0), axis=-2)
    alive = mx.tril(mx.ones((n + 1, n + 1), dtype=mx.bool_))
    if owner is not None:
        alive = alive & (owner[:, :, None] == owner[:, None, :])[:, None, None]
    decay = _exp(sums, alive)
    before = mx.einsum("bgrid,bdgrkv->bigrkv", decay[..., :-1, 1:], update)
    after = mx.einsum("bgrd,bdgrkv->bgrkv", decay[..., -1, 1:], update)
    if state is not None:
        before = before + decay[..., :-1, 0].transpose(0, 3, 1, 2)[..., None, None] * state[:, None]
        after = after + decay[..., -1, 0, None, None] * state
    return before, after


def _exp(exponent: mx.array, where: mx.array) -> mx.array:
    """e^exponent where `where` holds, else 0."""
    return mx.exp(mx.where(where, exponent, -mx.inf))


def _einsum(spec: str, a: mx.array, b: mx.array) -> mx.array:
    """einsum of two arrays, summed and returned in float32; in the backward pass too, operands have the dtype of the arguments. Where that
    is bfloat16 the sum is rounded to it: MLX has no other product."""
    return mx.einsum(spec, a, b).astype(mx.float32)
