"""Softmax attention with RoPE, multi-head or grouped-query (Vaswani et al., 2017; Ainslie et al., 2023).

    q, k, v = x Wq^T, x Wk^T, x Wv^T, each with a bias where the model has one
    qk_norm: q, k = rms_norm(q), rms_norm(k) over each head, or over all;  q, k turned by their positions
    (all features of a head, or the first rope_dim), but in layers that rope_layers turns off
    p_ts = softmax over s <= t of  q_t . k_s / sqrt(K) (or times attention_multiplier);
    window W: over t - W < s <= t;   y_t = (sum_s p_ts v_s) Wo^T
    attention_gate: y_t = (sigmoid(x_t Wg^T) * sum_s p_ts v_s) Wo^T, feature by feature      (Qwen3-Next, 2025)

Query head h reads key/value head h // (H / Hk). Shapes: B batch, T and S length, D width, H query and Hk key/value heads, K head size.
"""

import numpy as np

from smedjan_common.model.config import ModelConfig
from smedjan_common.model.mixers.attention import rope_dims
from smedjan_common.reference.activations import sigmoid
from smedjan_common.reference.norm import rms_norm
from smedjan_common.reference.rope import rotate

State = dict[str, np.ndarray]


def forward(config: ModelConfig, params: dict[str, np.ndarray], x_BxTxD: np.ndarray, carried: dict) -> np.ndarray:
    """The whole sequence at once, [B, T, D] -> [B, T, D]."""
    query, key, value = project(config, params, x_BxTxD, start=0)
    at = np.arange(x_BxTxD.shape[1])
    return output(params, x_BxTxD, _attend(config, query, key, value, visible_TxS=_visible(config, at[:, None] - at)))


def initial_state(config: ModelConfig, batch: int) -> State:
    """No token seen yet: keys and values [B, 0, Hk, K]."""
    empty = np.zeros((batch, 0, config.kv_heads, config.head_dim))
    return {"key": empty, "value": empty}


def step(config: ModelConfig, params: dict[str, np.ndarray], x_BxD: np.ndarray, state: State, carried: dict) -> tuple[np.ndarray, State]:
    """One more token: [B, D] and the state -> [B, D] and the next state, which holds every key and value so far."""
    seen = state["key"].shape[1]
    query, key, value = project(config, params, x_BxD[:, None], start=seen)
    state = {"key": np.concatenate([state["key"], key], axis=1), "value": np.concatenate([state["value"], value], axis=1)}
    mixed = _attend(config, query, state["key"], state["value"], visible_TxS=_visible(config, seen - np.arange(seen + 1)[None]))
    return output(params, x_BxD[:, None], mixed)[:, 0], state


def _visible(config: ModelConfig, behind: np.ndarray) -> np.ndarray:
    """Whether a key that stands so many positions behind is seen."""
    return (behind >= 0) & (behind < config.window) if config.window else behind >= 0


def project(config: ModelConfig, params: dict[str, np.ndarray], x_BxTxD: np.ndarray, start: int) -> tuple[np.ndarray, ...]:
    """Turned queries [B, T, H, K] and keys [B, T, Hk, K], and values, of positions from `start` on."""

    def heads(name: str, count: int) -> np.ndarray:
        return linear(params, name, x_BxTxD).reshape(*x_BxTxD.shape[:2], count, config.head_dim)

    query, key = heads("q_proj", config.heads), heads("k_proj", config.kv_heads)
    if config.qk_norm:
        query, key = (_normed(config, params[f"{n}_norm.weight"], x) for n, x in (("q", query), ("k", key)))
    if config.attention_multiplier:  # scores are divided by sqrt(K) later
        query = query * (config.attention_multiplier * np.sqrt(config.head_dim))
    for turned in rope_dims(config):
        query, key = rotate(query, config, start, turned), rotate(key, config, start, turned)
    return query, key, heads("v_proj", config.kv_heads)


def _normed(config: ModelConfig, weight: np.ndarray, x_BxTxHxK: np.ndarray) -> np.ndarray:
    """Over each head, or over all of them together."""
    if config.qk_norm_over == "head":
        return rms_norm(x_BxTxHxK, weight, config.norm_eps)
    return rms_norm(x_BxTxHxK.reshape(*x_BxTxHxK.shape[:2], -1), weight, config.norm_eps).reshape(x_BxTxHxK.shape)


def linear(params: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    """x W^T, and its bias where the model has one."""
    return x @ params[f"{name}.weight"].T + params.get(f"{name}.bias", 0.0)


def output(params: dict[str, np.ndarray], x_BxTxD: np.ndarray, mixed_BxTxHxK: np.ndarray) -> np.ndarray:
    """What heads give, gated where the model does so, projected back to [B, T, D]."""
    mixed_BxTxF = mixed_BxTxHxK.reshape(*x_BxTxD.shape[:2], -1)
    if "gate_proj.weight" in params:
        mixed_BxTxF = mixed_BxTxF * sigmoid(linear(params, "gate_proj", x_BxTxD))
    return linear(params, "o_proj", mixed_BxTxF)


def _attend(
    config: ModelConfig,
    query_BxTxHxK: np.ndarray,
    key_BxSxHkxK: np.ndarray,
    value_BxSxHkxK: np.ndarray,
    visible_TxS: np.ndarray,
) -> np.ndarray:
    serves = np.arange(config.heads) // (config.heads // config.kv_heads)
    key_BxSxHxK, value_BxSxHxK = key_BxSxHkxK[:, :, serves], value_BxSxHkxK[:, :, serves]
    score_BxHxTxS = np.einsum("bthk,bshk->bhts", query_BxTxHxK, key_BxSxHxK) / np.sqrt(config.head_dim)
    score_BxHxTxS = np.where(visible_TxS, score_BxHxTxS, -np.inf)
    weight_BxHxTxS = np.exp(score_BxHxTxS - score_BxHxTxS.max(axis=-1, keepdims=True))
    weight_BxHxTxS /= weight_BxHxTxS.sum(axis=-1, keepdims=True)
    return np.einsum("bhts,bshk->bthk", weight_BxHxTxS, value_BxSxHxK)
