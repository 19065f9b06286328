"""Mixture of block attention (MoBA; Lu et al., 2025): every query sees its own block and the blocks whose mean keys suit it best.

    q, k, v = x Wq^T, x Wk^T, x Wv^T;  qk_norm: q, k = rms_norm(q), rms_norm(k) over each head;  q, k turned by their positions
    score_tj = (sum over the query heads of a group of q_t) . mean of k_s over block j
    chosen_tj: t's own block, t // block_size, and of the blocks before it the block_topk - 1 of highest score (ties: the lowest number)
    p_ts = softmax over s <= t in chosen blocks of  q_t . k_s / sqrt(K);   y_t = (sum_s p_ts v_s) Wo^T, or gated, as in attention.py

One choice per key/value head, shared by the query heads that read it. A block is scored by later queries only, when it is full. This is
the mask form: the choice is a mask on ordinary attention, and with block_topk blocks or fewer in the sequence it is ordinary attention.

Shapes: B batch, T and S length, D width, H query and Hk key/value heads, K head size, J blocks.
"""

import numpy as np

from smedjan_common.model.config import ModelConfig
from smedjan_common.reference.attention import output, project

Params = dict[str, np.ndarray]
State = dict[str, np.ndarray]


def forward(config: ModelConfig, params: Params, x_BxTxD: np.ndarray, carried: dict) -> np.ndarray:
    """The whole sequence at once, [B, T, D] -> [B, T, D]."""
    query, key, value = project(config, params, x_BxTxD, start=0)
    carried.setdefault("block_scores", []).append(scores(config, query, key))  # for tests: how close the choices are
    return output(params, x_BxTxD, _attend(config, query, key, value, start=0))


def initial_state(config: ModelConfig, batch: int) -> State:
    """No token seen yet: keys and values [B, 0, Hk, K]."""
    empty = np.zeros((batch, 0, config.kv_heads, config.head_dim))
    return {"key": empty, "value": empty}


def step(config: ModelConfig, params: Params, x_BxD: np.ndarray, state: State, carried: dict) -> tuple[np.ndarray, State]:
    """One more token: [B, D] and the state -> [B, D] and the next state, which holds every key and value so far."""
    seen = state["key"].shape[1]
    query, key, value = project(config, params, x_BxD[:, None], start=seen)
    state = {"key": np.concatenate([state["key"], key], axis=1), "value": np.concatenate([state["value"], value], axis=1)}
    return output(params, x_BxD[:, None], _attend(config, query, state["key"], state["value"], start=seen))[:, 0], state


def choose(config: ModelConfig, query_BxTxHxK: np.ndarray, key_BxSxHkxK: np.ndarray, start: int) -> np.ndarray:
    """Which blocks the queries at positions `start`, `start` + 1, … see, bool [B, Hk, T, J]."""
    length = query_BxTxHxK.shape[1]
    score_BxHkxTxJ = scores(config, query_BxTxHxK, key_BxSxHkxK)
    number_J, own_T = np.arange(score_BxHkxTxJ.shape[-1]), (start + np.arange(length)) // config.block_size
    score_BxHkxTxJ = np.where(number_J < own_T[:, None], score_BxHkxTxJ, -np.inf)
    best = np.argsort(-score_BxHkxTxJ, axis=-1, kind="stable")[..., : config.block_topk - 1]
    chosen = np.zeros(score_BxHkxTxJ.shape, bool)
    np.put_along_axis(chosen, best, True, axis=-1)
    return (chosen & (number_J < own_T[:, None])) | (number_J == own_T[:, None])


def scores(config: ModelConfig, query_BxTxHxK: np.ndarray, key_BxSxHkxK: np.ndarray) -> np.ndarray:
    """How well each block suits each query, [B, Hk, T, J]; the last block may be short, and only its own queries see it."""
    batch, length = query_BxTxHxK.shape[:2]
    starts = np.arange(0, key_BxSxHkxK.shape[1], config.block_size)
    mean_BxJxHkxK = np.add.reduceat(key_BxSxHkxK, starts, axis=1) / config.block_size
    summed_BxTxHkxK = query_BxTxHxK.reshape(batch, length, config.kv_heads, -1, config.head_dim).sum(axis=3)
    return np.einsum("btgk,bjgk->bgtj", summed_BxTxHkxK, mean_BxJxHkxK)


def _attend(config: ModelConfig, query_BxTxHxK: np.ndarray, key_BxSxHkxK: np.ndarray, value_BxSxHkxK: np.ndarray, start: int) -> np.ndarray:
    length = query_BxTxHxK.shape[1]
    serves, position_S = np.arange(config.heads) // (config.heads // config.kv_heads), np.arange(key_BxSxHkxK.shape[1])
    key_BxSxHxK, value_BxSxHxK = key_BxSxHkxK[:, :, serves], value_BxSxHkxK[:, :, serves]
    chosen_BxHkxTxS = choose(config, query_BxTxHxK, key_BxSxHkxK, start)[..., position_S // config.block_size]
    visible_BxHxTxS = chosen_BxHkxTxS[:, serves] & (position_S <= (start + np.arange(length))[:, None])
    score_BxHxTxS = np.einsum("bthk,bshk->bhts", query_BxTxHxK, key_BxSxHxK) / np.sqrt(config.head_dim)
    score_BxHxTxS = np.where(visible_BxHxTxS, score_BxHxTxS, -np.inf)
    weight_BxHxTxS = np.exp(score_BxHxTxS - score_BxHxTxS.max(axis=-1, keepdims=True))
    weight_BxHxTxS /= weight_BxHxTxS.sum(axis=-1, keepdims=True)
    return np.einsum("bhts,bshk->bthk", weight_BxHxTxS, value_BxSxHxK)
