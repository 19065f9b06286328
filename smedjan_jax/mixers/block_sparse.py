"""Mixture of block attention (MoBA; Lu et al., 2025): every query sees its own block and the blocks whose mean keys suit it best.

    score_tj = (sum over the query heads of a group of q_t) . mean of k_s over block j
    chosen_tj: t's own block, and of the blocks before it the block_topk - 1 of highest score (ties: the lowest number)
    o_t = softmax over s <= t in chosen blocks of (q_t . k_s / sqrt(K)) v_s

One choice per key/value head. The choice itself has no gradient, and a block is scored by later queries only, when it is full.

Implementations: "plain" is ordinary attention under the mask of the choice. "auto" and "fused" compute chosen blocks only: the pairs
of a query and a chosen earlier block are sorted by block and cut into tiles of queries of one block; what the tiles and the own blocks
give is merged by log-sum-exp. Time and memory grow with T * block_topk * block_size, besides the scores of the T^2 / block_size choices.
On a GPU that is a kernel (kernels/blocks.py), and short sequences go through cuDNN with the choice as a mask (kernels.for_blocks).

Shapes: B batch, T new positions, L cache length, D width, H query heads, G key/value heads, R = H / G, K head size; J blocks of S
positions, E = block_topk - 1 earlier blocks; N = B G, P = N T E pairs, X tiles of S queries.
"""

import functools

import jax
import jax.numpy as jnp

from smedjan_common.config import ModelConfig
from smedjan_jax import sharding
from smedjan_jax.kernels import for_blocks
from smedjan_jax.mixers import cudnn
from smedjan_jax.mixers.attention import Attention, masked_attention
from smedjan_jax.mixers.cache import write
from smedjan_jax.modules import Carried, Context, Params, State

SCORES_AT_ONCE = 1 << 24  # float32 values: 64 MiB
MOST_PASSES = 8  # over the scores, for as many blocks


class BlockSparseAttention(Attention):
    """The mixer `block-sparse`: attention's projections and RoPE, a choice of blocks, attention to those."""

    def __init__(self, config: ModelConfig, params: Params, name: str, implementation: str = "auto"):
        super().__init__(config, params, name, implementation)
        self.block_size, self.block_topk, self.config = config.block_size, config.block_topk, config

    def mix(self, projected: tuple[jax.Array, ...], context: Context, carried: Carried) -> tuple[jax.Array, Carried]:
        """What `project` gave, mixed over the positions and projected back to [B, T, D]."""
        query, key, value, *gate = projected
        query, key = self._turn(query, key, context)
        form = for_blocks(self.implementation, self.config, str(query.dtype), query.shape[1])
        attend = functools.partial(FORMS[form], block_size=self.block_size, block_topk=self.block_topk)
        return self._output(sharding.over_heads(attend, (query, key, value)), *gate), carried

    def step(self, x: jax.Array, context: Context, state: State, carried: Carried) -> tuple[jax.Array, State, Carried]:
        """Decoding: T new tokens after `context.position` earlier ones; keys, values [B, G, L, K] and block means [B, G, J, K] are kept.

        The newest J blocks are. Past L positions T tokens are of one block, whose entries no token of it sees otherwise.
        """
        position, T, S = context.position, x.shape[1], self.block_size
        assert position is not None
        query, key, value, *gate = self.project(x, context)
        query, key = self._turn(query, key, context)
        new = {"key": key.swapaxes(1, 2), "value": value.swapaxes(1, 2)}
        kept = {n: write(state[n], new[n], context, axis=2) for n in new}
        at_BT = position[:, None] + jnp.arange(T)
        means, look = (_own_mean, _step_at_chosen) if T == 1 else (_all_means, _step_at_all)
        mean_BGJK = means(state["mean"], kept["key"], context, at_BT[:, -1], S)
        chosen_BGTE = choose_kept(query, mean_BGJK, at_BT // S, self.block_topk)
        mixed = look(query, kept["key"], kept["value"], chosen_BGTE, at_BT, S)
        return self._output(mixed, *gate), {**kept, "mean": mean_BGJK}, carried


def masked_blocks(query: jax.Array, key: jax.Array, value: jax.Array, block_size: int, block_topk: int) -> jax.Array:
    """The plain form, by a mask on every pair: [B, T, H, K] of queries [B, T, H, K], keys and values [B, T, G, K]."""
    T, at_T = query.shape[1], jnp.arange(query.shape[1])
    chosen_BGTE = choose(query, block_means(key, block_size), at_T // block_size, block_topk)
    return masked_attention(query, key, value, _seen(chosen_BGTE, at_T, T, block_size))


def _masked_by_cudnn(query: jax.Array, key: jax.Array, value: jax.Array, block_size: int, block_topk: int) -> jax.Array:
    """The same by cuDNN, bfloat16 on a GPU."""
    T, at_T = query.shape[1], jnp.arange(query.shape[1])
    chosen_BGTE = choose(query, block_means(key, block_size), at_T // block_size, block_topk)
    seen = jnp.repeat(_seen(chosen_BGTE, at_T, T, block_size), query.shape[2] // key.shape[2], axis=1)
    return jax.nn.dot_product_attention(query, key, value, mask=seen, is_causal=True, implementation=cudnn.IMPLEMENTATION)


def _by_kernel(query: jax.Array, key: jax.Array, value: jax.Array, block_size: int, block_topk: int) -> jax.Array:
    """The same by the kernel of smedjan_jax/kernels/blocks.py."""
    from smedjan_jax.kernels import blocks

    (B, T, H, K), G = query.shape, key.shape[2]
    (q_NTRK, key_YSK, value_YSK), chosen_NTE = _cut(query, key, value, block_size, block_topk)
    out_NTRK = blocks.attend(q_NTRK, key_YSK, value_YSK, blocks.lists(chosen_NTE, -(-T // block_size), block_size))
    return out_NTRK.reshape(B, G, -1, H // G, K).swapaxes(1, 2).reshape(B, -1, H, K)[:, :T]


def _cut(query: jax.Array, key: jax.Array, value: jax.Array, S: int, block_topk: int) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Queries [N, J S, R, K], keys and values [N J, S, K], and the choices [N, J S, E]."""
    (B, T, H, K), G = query.shape, key.shape[2]
    J, N = -(-T // S), B * G
    chosen_BGTE = _chosen_in_parts(query, block_means(key, S), S, block_topk)
    q_NTRK = _whole_blocks(query, S).reshape(B, J * S, G, H // G, K).swapaxes(1, 2).reshape(N, J * S, H // G, K)
    key_YSK, value_YSK = (_whole_blocks(a, S).swapaxes(1, 2).reshape(N * J, S, K) for a in (key, value))
    return (q_NTRK, key_YSK, value_YSK), chosen_BGTE.reshape(N, J * S, -1)


def gathered_blocks(query: jax.Array, key: jax.Array, value: jax.Array, block_size: int, block_topk: int) -> jax.Array:
    """The same, computing only what is seen."""
    (B, T, H, K), G, S = query.shape, key.shape[2], block_size
    J, R = -(-T // S), H // G
    N = B * G
    (q_NTRK, key_YSK, value_YSK), chosen_NTE = _cut(query, key, value, S, block_topk)
    q_YSRK = q_NTRK.reshape(N * J, S, R, K)
    own = _tiles(q_YSRK, key_YSK, value_YSK, jnp.arange(N * J), causal=True)
    parts = [tuple(a.reshape(N, J * S, 1, *a.shape[2:]) for a in own)]
    if chosen_NTE.shape[-1]:
        parts.append(_earlier_blocks(q_NTRK, key_YSK, value_YSK, chosen_NTE, J))
    out_NTRK = _merge(*(jnp.concatenate(arrays, axis=2) for arrays in zip(*parts, strict=True)))
    return out_NTRK.reshape(B, G, J * S, R, K).swapaxes(1, 2).reshape(B, J * S, H, K)[:, :T]


FORMS = {"plain": masked_blocks, "masked": _masked_by_cudnn, "pallas": _by_kernel, "gathered": gathered_blocks}


def block_means(key: jax.Array, block_size: int) -> jax.Array:
    """Mean key of every block, float32 [B, G, J, K], of keys [B, T, G, K]; that of a last block that is short is never used."""
    B, _, G, K = key.shape
    return _whole_blocks(key, block_size).astype(jnp.float32).reshape(B, -1, block_size, G, K).mean(axis=2).swapaxes(1, 2)


def choose(query: jax.Array, mean: jax.Array, own: jax.Array, block_topk: int) -> jax.Array:
    """The earlier blocks that queries [B, T, H, K] of the blocks `own` [T] see, best first, int32 [B, G, T, E]; J stands for none."""
    J = mean.shape[2]
    scores = jnp.where(jnp.arange(J) < own[:, None], _scores(query, mean), -jnp.inf)
    chosen = _best(scores, min(block_topk, J) - 1)
    return jnp.where(chosen < own[:, None], chosen, J)


def choose_kept(query: jax.Array, mean: jax.Array, own: jax.Array, block_topk: int) -> jax.Array:
    """The same for queries of the blocks `own` [B, T], by their places in a ring that holds the newest J blocks."""
    J = mean.shape[2]
    place_BTJ = (own[..., None] + 1 + jnp.arange(J)) % J  # of the oldest block first, the own one last
    number_BTJ = own[..., None] - (J - 1 - jnp.arange(J))  # under 0: no block yet
    scores = jnp.take_along_axis(_scores(query, mean), place_BTJ[:, None], axis=-1)
    scores = jnp.where((number_BTJ >= 0)[:, None] & (jnp.arange(J) < J - 1), scores, -jnp.inf)
    best, chosen = jax.lax.top_k(scores, min(block_topk, J) - 1)
    return jnp.where(best > -jnp.inf, jnp.take_along_axis(place_BTJ[:, None], chosen, axis=-1), J)


def _scores(query: jax.Array, mean: jax.Array) -> jax.Array:
    """How well each block suits each query, float32 [B, G, T, J]."""
    (B, T, H, K), G = query.shape, mean.shape[1]
    summed_BTGK = jax.lax.stop_gradient(query).astype(jnp.float32).reshape(B, T, G, H // G, K).sum(axis=3)
    return jnp.einsum("btgk,bgjk->bgtj", summed_BTGK, jax.lax.stop_gradient(mean), precision=jax.lax.Precision.HIGHEST)


def _best(scores: jax.Array, count: int) -> jax.Array:
    """Where the `count` highest of the last axis are, highest first, of equal ones the first; the axis' length where all else is -inf."""
    if count > MOST_PASSES:
        return jax.lax.top_k(scores, count)[1]
    number, found = jnp.arange(scores.shape[-1]), []
    for _ in range(count):  # a pass each; on a GPU top_k sorts
        best = jnp.argmax(scores, axis=-1)
        found.append(jnp.where(jnp.max(scores, axis=-1) > -jnp.inf, best, scores.shape[-1]))
        scores = jnp.where(number == best[..., None], -jnp.inf, scores)
    return jnp.stack(found, axis=-1) if found else jnp.zeros((*scores.shape[:-1], 0), jnp.int32)


def _chosen_in_parts(query: jax.Array, mean: jax.Array, block_size: int, block_topk: int) -> jax.Array:
    """`choose` for all positions of whole blocks, some blocks of queries at once, so that not all scores are held: [B, G, J S, E]."""
    (B, _, H, K), (G, J) = query.shape, mean.shape[1:3]
    q_JBSHK = _whole_blocks(query, block_size).reshape(B, J, block_size, H, K).swapaxes(0, 1)
    at_once = max(1, SCORES_AT_ONCE // (B * G * block_size * J))
    chosen_JBGSE = jax.lax.map(lambda part: choose(part[0], mean, part[1][None], block_topk), (q_JBSHK, jnp.arange(J)), batch_size=at_once)
    return jnp.moveaxis(chosen_JBGSE, 0, 2).reshape(B, G, J * block_size, chosen_JBGSE.shape[-1])


def _earlier_blocks(q_NTRK: jax.Array, key_YSK: jax.Array, value_YSK: jax.Array, chosen_NTE: jax.Array, J: int):
    """What each query gets from each of its earlier blocks, [N, T, E, R, K], and its log-sum-exp [N, T, E, R], -inf for none."""
    (N, T, R, K), (Y, S, _), E = q_NTRK.shape, key_YSK.shape, chosen_NTE.shape[2]
    block_P = jnp.where(chosen_NTE < J, chosen_NTE + J * jnp.arange(N)[:, None, None], Y).reshape(-1)
    order_P = jnp.argsort(block_P)
    count_Y = jnp.zeros(Y + 1, jnp.int32).at[block_P].add(1)[:Y]
    tiles_Y = -(-count_Y // S)
    start_Y, first_Y = jnp.cumsum(count_Y) - count_Y, jnp.cumsum(tiles_Y) - tiles_Y
    X = block_P.size // S + Y  # every block ends in one tile that is not full, at most
    block_X = jax.lax.cummax(jnp.zeros(X + 1, jnp.int32).at[first_Y].max(jnp.arange(Y)))[:X]
    place_XS = (jnp.arange(X) - first_Y[block_X])[:, None] * S + jnp.arange(S)
    pair_XS = order_P[jnp.where(place_XS < count_Y[block_X, None], start_Y[block_X, None] + place_XS, 0)]
    out, lse = _tiles(q_NTRK.reshape(N * T, R, K)[pair_XS // E], key_YSK, value_YSK, block_X, causal=False)
    rank_P = jnp.zeros_like(order_P).at[order_P].set(jnp.arange(order_P.size))
    some_P, near_P = block_P < Y, jnp.minimum(block_P, Y - 1)
    slot_P = jnp.where(some_P, first_Y[near_P] * S + rank_P - start_Y[near_P], 0)
    lse_PR = jnp.where(some_P[:, None], lse.reshape(X * S, R)[slot_P], -jnp.inf)
    return out.reshape(X * S, R, K)[slot_P].reshape(N, T, E, R, K), lse_PR.reshape(N, T, E, R)


def _tiles(q_XSRK: jax.Array, key_YSK: jax.Array, value_YSK: jax.Array, block_X: jax.Array, causal: bool) -> tuple[jax.Array, jax.Array]:
    """Attention of the queries of each tile to its block: output [X, S, R, K] and log-sum-exp [X, S, R], some tiles at once."""
    (_, S, R, K) = q_XSRK.shape
    seen_S1S = jnp.tril(jnp.ones((S, S), bool))[:, None] if causal else jnp.ones((), bool)

    @jax.checkpoint
    def tile(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        q_SRK, block = part
        scores = jnp.einsum("crk,sk->crs", q_SRK, key_YSK[block], preferred_element_type=jnp.float32) * K**-0.5
        scores = jnp.where(seen_S1S, scores, -jnp.inf)
        lse = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
        return jnp.einsum("crs,sk->crk", jnp.exp(scores - lse).astype(q_SRK.dtype), value_YSK[block]), lse[..., 0]

    return jax.lax.map(tile, (q_XSRK, block_X), batch_size=max(1, SCORES_AT_ONCE // (S * S * R)))


def _merge(out_NTERK: jax.Array, lse_NTER: jax.Array) -> jax.Array:
    """Softmax over all of E from the softmaxes over each, [N, T, R, K]; the first of E is never empty."""
    weight_NTER = jax.nn.softmax(lse_NTER, axis=2)
    return (out_NTERK.astype(jnp.float32) * weight_NTER[..., None]).sum(axis=2).astype(out_NTERK.dtype)


def _own_mean(mean: jax.Array, key: jax.Array, context: Context, last: jax.Array, block_size: int) -> jax.Array:
    """The means with that of each row's newest block, as far as it goes: up to the position `last` [B]."""
    (B, G, _, K), S = key.shape, block_size
    blocks = key.reshape(B, G, -1, S, K)
    own_B1111 = (last // S % blocks.shape[2]).reshape(B, 1, 1, 1, 1)
    own_BGSK = jnp.take_along_axis(blocks, own_B1111, axis=2)[:, :, 0].astype(jnp.float32)
    there_B1S1 = (jnp.arange(S) <= last[:, None] % S)[:, None, :, None]
    own = jnp.where(there_B1S1, own_BGSK, 0.0).sum(axis=2, keepdims=True) / S
    return write(mean, own, context, axis=2, span=S)


def _all_means(mean: jax.Array, key: jax.Array, context: Context, last: jax.Array, block_size: int) -> jax.Array:
    """The mean of each block, of keys up to the position `last` [B]; those of rows that are not active stay."""
    (B, G, L, K), S = key.shape, block_size
    own_B1 = (last // S)[:, None]
    number_BJ = own_B1 - (own_B1 - jnp.arange(L // S)) % (L // S)
    there_BJS = (number_BJ[..., None] * S + jnp.arange(S)) <= last[:, None, None]
    kept = jnp.where(there_BJS[:, None, ..., None], key.reshape(B, G, -1, S, K).astype(jnp.float32), 0.0)
    all_means = kept.sum(axis=3) / S
    return all_means if context.active is None else jnp.where(context.active[:, None, None, None], all_means, mean)


def _step_at_all(query: jax.Array, key: jax.Array, value: jax.Array, chosen: jax.Array, at: jax.Array, block_size: int) -> jax.Array:
    """A chunk of a prompt, at the positions `at` [B, T], against the whole ring, under the mask."""
    J, S = key.shape[2] // block_size, block_size
    is_own_BTJ = jnp.arange(J) == (at // S % J)[..., None]
    upto_BTS = jnp.arange(S) <= (at % S)[..., None]
    chosen_BGTJ = (chosen[..., None] == jnp.arange(J)).any(axis=-2)
    seen_BGTJS = chosen_BGTJ[..., None] | (is_own_BTJ[..., None] & upto_BTS[:, :, None])[:, None]
    return masked_attention(query, key.swapaxes(1, 2), value.swapaxes(1, 2), seen_BGTJS.reshape(*seen_BGTJS.shape[:3], J * S))


def _step_at_chosen(query: jax.Array, key: jax.Array, value: jax.Array, chosen: jax.Array, at: jax.Array, block_size: int) -> jax.Array:
    """One token of each row against its own block and the chosen ones, which alone are read from the ring."""
    (B, G, L, K), S = key.shape, block_size
    J = L // S
    own = jnp.broadcast_to((at // S % J)[:, None], (B, G, 1)).astype(chosen.dtype)
    block_BGE = jnp.concatenate([own, chosen[:, :, 0]], axis=-1)
    key, value = (jnp.take_along_axis(a.reshape(B, G, J, S, K), block_BGE[..., None, None], axis=2, mode="clip") for a in (key, value))
    own_BG1S = jnp.broadcast_to((jnp.arange(S) <= at % S)[:, None, None], (B, G, 1, S))
    others_BGES = jnp.broadcast_to(chosen[:, :, 0, :, None] < J, (*chosen.shape[:2], chosen.shape[3], S))
    seen_BG1L = jnp.concatenate([own_BG1S, others_BGES], axis=2).reshape(B, G, 1, -1)
    return masked_attention(query, key.reshape(B, G, -1, K).swapaxes(1, 2), value.reshape(B, G, -1, K).swapaxes(1, 2), seen_BG1L)


def _seen(chosen_BGTE: jax.Array, at_T: jax.Array, length: int, block_size: int) -> jax.Array:
    """Which of `length` positions the queries at positions `at_T` see, bool [B, G, T, length]."""
    number_J = jnp.arange(-(-length // block_size))
    seen_BGTJ = (chosen_BGTE[..., None] == number_J).any(axis=-2) | (number_J == at_T[:, None] // block_size)
    return jnp.repeat(seen_BGTJ, block_size, axis=-1)[..., :length] & (jnp.arange(length) <= at_T[:, None])


def _whole_blocks(x: jax.Array, block_size: int) -> jax.Array:
    """x [B, T, …] with zeros behind, so that its length is a multiple of the block's."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block_size), *[(0, 0)] * (x.ndim - 2)])
