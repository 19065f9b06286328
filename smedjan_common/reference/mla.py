"""Multi-head latent attention with decoupled RoPE (DeepSeek-V2, 2024; V3, 2024).

    q = x Wq^T,  or  rms_norm(x Wqa^T) Wqb^T;        [c; r] = x Wkva^T,  c = rms_norm(c);        [k_n; v] = c Wkvb^T per head
    q = [q_n; q_r] per head;  q_r and r (one for all heads) turned by their positions
    p_ts = softmax over s <= t of  (n^2 q_n . k_n + m^2 q_r . r) / sqrt(N + P);   y_t = (sum_s p_ts v_s) Wo^T

m is YaRN's attention factor, 1 without it, and n is the same unless mla_plain_factor says otherwise: it multiplies the whole score, as in
DeepSeek's models. `forward` expands the latent c into keys and values; `step` keeps c and r only and absorbs Wkvb into the query and the
output: q_n . k_n = (Wk^T q_n) . c.

Shapes: B batch, T and S length, D width, H heads, N features of a head without and P with position, V = N value features, R latent.
"""

import numpy as np

from smedjan_common.model.config import ModelConfig
from smedjan_common.model.mixers.mla import kv_rank, rope_dim
from smedjan_common.model.rope import plain_factor
from smedjan_common.reference.norm import rms_norm
from smedjan_common.reference.rope import rotate

Params = dict[str, np.ndarray]
State = dict[str, np.ndarray]


def forward(config: ModelConfig, params: Params, x_BxTxD: np.ndarray, carried: dict) -> np.ndarray:
    """The whole sequence at once, [B, T, D] -> [B, T, D]."""
    plain_q, turned_q, latent_BxTxR, turned_k = _project(config, params, x_BxTxD, start=0)
    key_weight, value_weight = _up_weights(config, params)
    key_BxSxHxN = np.einsum("bsr,hnr->bshn", latent_BxTxR, key_weight)
    value_BxSxHxV = np.einsum("bsr,hvr->bshv", latent_BxTxR, value_weight)
    score = np.einsum("bthn,bshn->bhts", plain_q, key_BxSxHxN) + np.einsum("bthp,bsp->bhts", turned_q, turned_k)
    visible_TxS = np.tril(np.ones((x_BxTxD.shape[1],) * 2, bool))
    mixed_BxTxHxV = np.einsum("bhts,bshv->bthv", _weights(config, score, visible_TxS), value_BxSxHxV)
    return mixed_BxTxHxV.reshape(*x_BxTxD.shape[:2], -1) @ params["o_proj.weight"].T


def initial_state(config: ModelConfig, batch: int) -> State:
    """No token seen yet: latents [B, 0, R] and turned keys [B, 0, P]."""
    return {"latent": np.zeros((batch, 0, kv_rank(config))), "key": np.zeros((batch, 0, rope_dim(config)))}


def step(config: ModelConfig, params: Params, x_BxD: np.ndarray, state: State, carried: dict) -> tuple[np.ndarray, State]:
    """One more token: [B, D] and the state -> [B, D] and the next state, which holds every latent and turned key so far."""
    seen = state["latent"].shape[1]
    plain_q, turned_q, latent, turned_k = _project(config, params, x_BxD[:, None], start=seen)
    state = {"latent": np.concatenate([state["latent"], latent], axis=1), "key": np.concatenate([state["key"], turned_k], axis=1)}
    key_weight, value_weight = _up_weights(config, params)
    absorbed_BxTxHxR = np.einsum("bthn,hnr->bthr", plain_q, key_weight)
    score = np.einsum("bthr,bsr->bhts", absorbed_BxTxHxR, state["latent"]) + np.einsum("bthp,bsp->bhts", turned_q, state["key"])
    mixed_BxTxHxR = np.einsum("bhts,bsr->bthr", _weights(config, score, np.ones((1, seen + 1), bool)), state["latent"])
    mixed_BxTxHxV = np.einsum("bthr,hvr->bthv", mixed_BxTxHxR, value_weight)
    return mixed_BxTxHxV.reshape(len(x_BxD), -1) @ params["o_proj.weight"].T, state


def _project(config: ModelConfig, params: Params, x_BxTxD: np.ndarray, start: int) -> tuple[np.ndarray, ...]:
    """Queries without and with position [B, T, H, N], [B, T, H, P], latents [B, T, R], turned keys [B, T, P]."""
    if config.mla_q_rank:
        query = rms_norm(x_BxTxD @ params["q_a_proj.weight"].T, params["q_a_norm.weight"], config.norm_eps) @ params["q_b_proj.weight"].T
    else:
        query = x_BxTxD @ params["q_proj.weight"].T
    query = query.reshape(*x_BxTxD.shape[:2], config.heads, config.head_dim + rope_dim(config))
    plain_q, turned_q = np.split(query, [config.head_dim], axis=-1)
    latent, key = np.split(x_BxTxD @ params["kv_a_proj.weight"].T, [-rope_dim(config)], axis=-1)
    latent = rms_norm(latent, params["kv_a_norm.weight"], config.norm_eps)
    # `rotate` multiplies both sides by m
    return plain_q * plain_factor(config) ** 2, rotate(turned_q, config, start), latent, rotate(key[:, :, None], config, start)[:, :, 0]


def _up_weights(config: ModelConfig, params: Params) -> tuple[np.ndarray, ...]:
    """The rows of Wkvb that make keys [H, N, R] and values [H, V, R]."""
    weight = params["kv_b_proj.weight"].reshape(config.heads, 2 * config.head_dim, -1)
    return tuple(np.split(weight, 2, axis=1))


def _weights(config: ModelConfig, score_BxHxTxS: np.ndarray, visible_TxS: np.ndarray) -> np.ndarray:
    score = np.where(visible_TxS, score_BxHxTxS / np.sqrt(config.head_dim + rope_dim(config)), -np.inf)
    weight = np.exp(score - score.max(axis=-1, keepdims=True))
    return weight / weight.sum(axis=-1, keepdims=True)
