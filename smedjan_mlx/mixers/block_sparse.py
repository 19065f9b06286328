"""Mixture of block attention (MoBA; Lu et al., 2025): every query sees its own block and the blocks whose mean keys suit it best.

    score_tj = (sum over the query heads of a group of q_t) . mean of k_s over block j
    chosen_tj: t's own block, and of the blocks before it the block_topk - 1 of highest score (ties: the lowest number)
    o_t = softmax over s <= t in chosen blocks of (q_t . k_s / sqrt(K)) v_s

One choice per key/value head. The choice itself has no gradient, and a block is scored by later queries only, when it is full.

Implementations: "plain" is ordinary attention under the mask of the choice. "auto" and "fused" compute chosen blocks only: the pairs
of a query and a chosen earlier block are sorted by block and cut into tiles of queries of one block; what the tiles and the own blocks
give is merged by log-sum-exp. Time and memory grow with T * block_topk * block_size, besides the scores of the T^2 / block_size choices.

Shapes: B batch, T new positions, L cache length, D width, H query heads, G key/value heads, R = H / G, K head size; J blocks of S
positions, E = block_topk - 1 earlier blocks; N = B G, P = N T E pairs, X tiles of S queries.
MLX keeps heads before positions, [B, H, T, K]; JAX keeps positions first.
"""

import functools

import mlx.core as mx

from smedjan_common.config import ModelConfig
from smedjan_mlx.mixers.attention import Attention, masked_attention
from smedjan_mlx.mixers.cache import write
from smedjan_mlx.modules import Carried, Context, Params, State

SCORES_AT_ONCE = 1 << 24  # float32 values: 64 MiB


class BlockSparseAttention(Attention):
    """The mixer `block-sparse`: attention's projections and RoPE, a choice of blocks, attention to those."""

    def __init__(self, config: ModelConfig, params: Params, name: str, implementation: str = "auto"):
        super().__init__(config, params, name, implementation)
        self.block_size, self.block_topk = config.block_size, config.block_topk

    def mix(self, projected: tuple[mx.array, ...], context: Context, carried: Carried) -> tuple[mx.array, Carried]:
        """What `project` gave, mixed over the positions and projected back to [B, T, D]."""
        query, key, value, *gate = projected
        query, key = self._turn(query, key, context)
        attend = masked_blocks if self.implementation == "plain" else gathered_blocks
        return self._output(attend(query, key, value, self.block_size, self.block_topk), *gate), carried

    def step(self, x: mx.array, context: Context, state: State, carried: Carried) -> tuple[mx.array, State, Carried]:
        """Decoding: T new tokens after `context.position` earlier ones; keys, values [B, G, L, K] and block means [B, G, J, K] are kept.

        The newest J blocks are. Past L positions T tokens are of one block, whose entries no token of it sees otherwise.
        """
        position, T, S = context.position, x.shape[1], self.block_size
        assert position is not None
        query, key, value, *gate = self.project(x, context)
        query, key = self._turn(query, key, context)
        new = {"key": key, "value": value}
        kept = {n: write(state[n], new[n], context, axis=2) for n in new}
        at_BT = position[:, None] + mx.arange(T)
        means, look = (_own_mean, _step_at_chosen) if T == 1 else (_all_means, _step_at_all)
        mean_BGJK = means(state["mean"], kept["key"], context, at_BT[:, -1], S)
        chosen_BGTE = choose_kept(query, mean_BGJK, at_BT // S, self.block_topk)
        mixed = look(query, kept["key"], kept["value"], chosen_BGTE, at_BT, S)
        return self._output(mixed, *gate), {**kept, "mean": mean_BGJK}, carried


def masked_blocks(query: mx.array, key: mx.array, value: mx.array, block_size: int, block_topk: int) -> mx.array:
    """The plain form, by a mask on every pair: [B, H, T, K] of queries [B, H, T, K], keys and values [B, G, T, K]."""
    T, at_T = query.shape[2], mx.arange(query.shape[2])
    chosen_BGTE = choose(query, block_means(key, block_size), at_T // block_size, block_topk)
    return masked_attention(query, key, value, _seen(chosen_BGTE, at_T, T, block_size))


def gathered_blocks(query: mx.array, key: mx.array, value: mx.array, block_size: int, block_topk: int) -> mx.array:
    """The same, computing only what is seen."""
    (B, H, T, K), G, S = query.shape, key.shape[1], block_size
    J, R = -(-T // S), H // G
    N = B * G
    chosen_BGTE = _chosen_in_parts(query, block_means(key, S), S, block_topk)
    q_NTRK = _whole_blocks(query, S).reshape(N, R, J * S, K).swapaxes(1, 2)
    key_YSK, value_YSK = (_whole_blocks(a, S).reshape(N * J, S, K) for a in (key, value))
    q_YSRK = q_NTRK.reshape(N * J, S, R, K)
    own = _tiles(q_YSRK, key_YSK, value_YSK, mx.arange(N * J), causal=True)
    parts = [tuple(a.reshape(N, J * S, 1, *a.shape[2:]) for a in own)]
    if E := chosen_BGTE.shape[-1]:
        parts.append(_earlier_blocks(q_NTRK, key_YSK, value_YSK, chosen_BGTE.reshape(N, J * S, E), J))
    out_NTRK = _merge(*(mx.concatenate(list(arrays), axis=2) for arrays in zip(*parts, strict=True)))
    return out_NTRK.swapaxes(1, 2).reshape(B, H, J * S, K)[:, :, :T]


def block_means(key: mx.array, block_size: int) -> mx.array:
    """Mean key of every block, float32 [B, G, J, K], of keys [B, G, T, K]; that of a last block that is short is never used."""
    B, G, _, K = key.shape
    return _whole_blocks(key, block_size).astype(mx.float32).reshape(B, G, -1, block_size, K).mean(axis=3)


def choose(query: mx.array, mean: mx.array, own: mx.array, block_topk: int) -> mx.array:
    """The earlier blocks that queries [B, H, T, K] of the blocks `own` [T] see, best first, int32 [B, G, T, E]; J stands for none."""
    J = mean.shape[2]
    scores = mx.where(mx.arange(J) < own[:, None], _scores(query, mean), -mx.inf)
    chosen = mx.argsort(-scores, axis=-1)[..., : min(block_topk, J) - 1].astype(mx.int32)  # stable: ties keep their order
    return mx.where(chosen < own[:, None], chosen, J)


def choose_kept(query: mx.array, mean: mx.array, own: mx.array, block_topk: int) -> mx.array:
    """The same for queries of the blocks `own` [B, T], by their places in a ring that holds the newest J blocks."""
    J = mean.shape[2]
    place_BTJ = (own[..., None] + 1 + mx.arange(J)) % J  # of the oldest block first, the own one last
    number_BTJ = own[..., None] - (J - 1 - mx.arange(J))  # under 0: no block yet
    scores = mx.take_along_axis(_scores(query, mean), place_BTJ[:, None], axis=-1)
    scores = mx.where((number_BTJ >= 0)[:, None] & (mx.arange(J) < J - 1), scores, -mx.inf)
    chosen = mx.argsort(-scores, axis=-1)[..., : min(block_topk, J) - 1]  # stable: ties keep their order
    places = mx.take_along_axis(mx.broadcast_to(place_BTJ[:, None], scores.shape), chosen, axis=-1)
    return mx.where(mx.take_along_axis(scores, chosen, axis=-1) > -mx.inf, places, J)


def _scores(query: mx.array, mean: mx.array) -> mx.array:
    """How well each block suits each query, float32 [B, G, T, J]."""
    (B, H, T, K), G = query.shape, mean.shape[1]
    summed_BGTK = mx.stop_gradient(query).astype(mx.float32).reshape(B, G, H // G, T, K).sum(axis=2)
    return summed_BGTK @ mx.stop_gradient(mean).swapaxes(-1, -2)


def _chosen_in_parts(query: mx.array, mean: mx.array, block_size: int, block_topk: int) -> mx.array:
    """`choose` for all positions of whole blocks, some blocks of queries at once, so that not all scores are held: [B, G, J S, E]."""
    B, (G, J), query = query.shape[0], mean.shape[1:3], _whole_blocks(query, block_size)
    at_once = block_size * max(1, SCORES_AT_ONCE // (B * G * block_size * J))
    at_T = mx.arange(J * block_size)
    starts = range(0, J * block_size, at_once)
    parts = [choose(query[:, :, t : t + at_once], mean, at_T[t : t + at_once] // block_size, block_topk) for t in starts]
    return mx.concatenate(parts, axis=2)


def _earlier_blocks(q_NTRK: mx.array, key_YSK: mx.array, value_YSK: mx.array, chosen_NTE: mx.array, J: int):
    """What each query gets from each of its earlier blocks, [N, T, E, R, K], and its log-sum-exp [N, T, E, R], -inf for none."""
    (N, T, R, K), (Y, S, _), E = q_NTRK.shape, key_YSK.shape, chosen_NTE.shape[2]
    block_P = mx.where(chosen_NTE < J, chosen_NTE + J * mx.arange(N)[:, None, None], Y).reshape(-1)
    order_P = mx.argsort(block_P)
    count_Y = mx.zeros(Y + 1, mx.int32).at[block_P].add(1)[:Y]
    tiles_Y = (count_Y + S - 1) // S
    start_Y, first_Y = mx.cumsum(count_Y) - count_Y, mx.cumsum(tiles_Y) - tiles_Y
    X = block_P.size // S + Y  # every block ends in one tile that is not full, at most
    block_X = mx.cummax(mx.zeros(X + 1, mx.int32).at[first_Y].maximum(mx.arange(Y)))[:X]
    place_XS = (mx.arange(X) - first_Y[block_X])[:, None] * S + mx.arange(S)
    pair_XS = order_P[mx.where(place_XS < count_Y[block_X][:, None], start_Y[block_X][:, None] + place_XS, 0)]
    out, lse = _tiles(q_NTRK.reshape(N * T, R, K)[pair_XS // E], key_YSK, value_YSK, block_X, causal=False)
    rank_P = mx.zeros(order_P.shape, mx.int32).at[order_P].add(mx.arange(order_P.size))
    some_P, near_P = block_P < Y, mx.minimum(block_P, Y - 1)
    slot_P = mx.where(some_P, first_Y[near_P] * S + rank_P - start_Y[near_P], 0)
    lse_PR = mx.where(some_P[:, None], lse.reshape(X * S, R)[slot_P], -mx.inf)
    return out.reshape(X * S, R, K)[slot_P].reshape(N, T, E, R, K), lse_PR.reshape(N, T, E, R)


def _tiles(q_XSRK: mx.array, key_YSK: mx.array, value_YSK: mx.array, block_X: mx.array, causal: bool) -> tuple[mx.array, mx.array]:
    """Attention of the queries of each tile to its block: output [X, S, R, K] and log-sum-exp [X, S, R], some tiles at once."""
    X, S, R, K = q_XSRK.shape
    seen_S1S = mx.tril(mx.ones((S, S), dtype=mx.bool_))[:, None] if causal else mx.array(True)

    def tiles(block_X: mx.array, q_XSRK: mx.array, key_YSK: mx.array, value_YSK: mx.array) -> tuple[mx.array, mx.array]:
        rows = q_XSRK.reshape(-1, S * R, K)
        scores = (rows @ key_YSK[block_X].swapaxes(-1, -2)).astype(mx.float32).reshape(-1, S, R, S) * K**-0.5
        scores = mx.where(seen_S1S, scores, -mx.inf)
        lse = mx.logsumexp(scores, axis=-1, keepdims=True)
        weights = mx.exp(scores - lse).astype(q_XSRK.dtype).reshape(-1, S * R, S)
        return (weights @ value_YSK[block_X]).reshape(-1, S, R, K), lse[..., 0]

    at_once = max(1, SCORES_AT_ONCE // (S * S * R))
    cuts = [slice(x, x + at_once) for x in range(0, X, at_once)]
    parts = [mx.checkpoint(functools.partial(tiles, block_X[cut]))(q_XSRK[cut], key_YSK, value_YSK) for cut in cuts]
    out, lse = (mx.concatenate(list(arrays)) for arrays in zip(*parts, strict=True))
    return out, lse


def _merge(out_NTERK: mx.array, lse_NTER: mx.array) -> mx.array:
    """Softmax over all of E from the softmaxes over each, [N, T, R, K]; the first of E is never empty."""
    weight_NTER = mx.softmax(lse_NTER, axis=2)
    return (out_NTERK.astype(mx.float32) * weight_NTER[..., None]).sum(axis=2).astype(out_NTERK.dtype)


def _own_mean(mean: mx.array, key: mx.array, context: Context, last: mx.array, block_size: int) -> mx.array:
    """The means with that of each row's newest block, as far as it goes: up to the position `last` [B]."""
    (B, G, _, K), S = key.shape, block_size
    blocks = key.reshape(B, G, -1, S, K)
    own_B1111 = (last // S % blocks.shape[2]).reshape(B, 1, 1, 1, 1)
    own_BGSK = mx.take_along_axis(blocks, own_B1111, axis=2)[:, :, 0].astype(mx.float32)
    there_B1S1 = (mx.arange(S) <= last[:, None] % S)[:, None, :, None]
    own = mx.where(there_B1S1, own_BGSK, 0.0).sum(axis=2, keepdims=True) / S
    return write(mean, own, context, axis=2, span=S)


def _all_means(mean: mx.array, key: mx.array, context: Context, last: mx.array, block_size: int) -> mx.array:
    """The mean of each block, of keys up to the position `last` [B]; those of rows that are not active stay."""
    (B, G, L, K), S = key.shape, block_size
    own_B1 = (last // S)[:, None]
    number_BJ = own_B1 - (own_B1 - mx.arange(L // S)) % (L // S)
    there_BJS = (number_BJ[..., None] * S + mx.arange(S)) <= last[:, None, None]
    kept = mx.where(there_BJS[:, None, ..., None], key.reshape(B, G, -1, S, K).astype(mx.float32), 0.0)
    all_means = kept.sum(axis=3) / S
    return all_means if context.active is None else mx.where(context.active[:, None, None, None], all_means, mean)


def _step_at_all(query: mx.array, key: mx.array, value: mx.array, chosen: mx.array, at: mx.array, block_size: int) -> mx.array:
    """A chunk of a prompt, at the positions `at` [B, T], against the whole ring, under the mask."""
    J, S = key.shape[2] // block_size, block_size
    is_own_BTJ = mx.arange(J) == (at // S % J)[..., None]
    upto_BTS = mx.arange(S) <= (at % S)[..., None]
    chosen_BGTJ = (chosen[..., None] == mx.arange(J)).any(axis=-2)
    seen_BGTJS = chosen_BGTJ[..., None] | (is_own_BTJ[..., None] & upto_BTS[:, :, None])[:, None]
    return masked_attention(query, key, value, seen_BGTJS.reshape(*seen_BGTJS.shape[:3], J * S))


def _step_at_chosen(query: mx.array, key: mx.array, value: mx.array, chosen: mx.array, at: mx.array, block_size: int) -> mx.array:
    """One token of each row against its own block and the chosen ones, which alone are read from the ring."""
    (B, G, L, K), S = key.shape, block_size
    J = L // S
    own = mx.broadcast_to((at // S % J)[:, None], (B, G, 1)).astype(chosen.dtype)
    read_BGE11 = mx.minimum(mx.concatenate([own, chosen[:, :, 0]], axis=-1), J - 1)[..., None, None]
    key, value = (mx.take_along_axis(a.reshape(B, G, J, S, K), read_BGE11, axis=2).reshape(B, G, -1, K) for a in (key, value))
    own_BG1S = mx.broadcast_to((mx.arange(S) <= at % S)[:, None, None], (B, G, 1, S))
    others_BGES = mx.broadcast_to(chosen[:, :, 0, :, None] < J, (*chosen.shape[:2], chosen.shape[3], S))
    return masked_attention(query, key, value, mx.concatenate([own_BG1S, others_BGES], axis=2).reshape(B, G, 1, -1))


def _seen(chosen_BGTE: mx.array, at_T: mx.array, length: int, block_size: int) -> mx.array:
    """Which of `length` positions the queries at positions `at_T` see, bool [B, G, T, length]."""
    number_J = mx.arange(-(-length // block_size))
    seen_BGTJ = (chosen_BGTE[..., None] == number_J).any(axis=-2) | (number_J == at_T[:, None] // block_size)
    return mx.repeat(seen_BGTJ, block_size, axis=-1)[..., :length] & (mx.arange(length) <= at_T[:, None])


def _whole_blocks(x: mx.array, block_size: int) -> mx.array:
    """x [B, H, T, K] with zeros behind its T positions, so that their number is a multiple of the block's."""
    return mx.pad(x, [(0, 0), (0, 0), (0, -x.shape[2] % block_size), (0, 0)])
