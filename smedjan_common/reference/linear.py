"""Linear attention with a decay per head (simple GLA: Yang et al., 2024; RetNet: Sun et al., 2023; no decay: Katharopoulos et al., 2020).

    q, k, v, r = x Wq^T, x Wk^T, x Wv^T, x Wr^T;   q, k <- phi(q) / sqrt(K), phi(k);   phi(z) = z (identity) or elu(z) + 1 (elu1)
    g = logsigmoid(x Wg^T + b) / 16 (scalar), log(1 - 2^(-5-h)) (fixed), 0 (none)
    o_t = sum_{s<=t} e^{g_{s+1} + … + g_t} (q_t . k_s) v_s              S_t = e^{g_t} S_{t-1} + k_t v_t^T, o_t = S_t^T q_t
    y = (rms_norm(o) * silu(r)) Wo^T          or, with the denominator, o_t <- o_t / (sum_{s<=t} e^{…} q_t . k_s + 1e-6)

Query head h reads key/value head h // (H / Hk), which has the decay.
Shapes: B batch, T and S length, D width, H query and Hk key/value heads, K head size.
"""

import numpy as np

from smedjan_common.model.config import ModelConfig
from smedjan_common.reference.activations import silu
from smedjan_common.reference.norm import rms_norm

State = dict[str, np.ndarray]
Params = dict[str, np.ndarray]


def forward(config: ModelConfig, params: Params, x_BxTxD: np.ndarray, carried: dict) -> np.ndarray:
    """The whole sequence at once, [B, T, D] -> [B, T, D]."""
    query_BxTxHxK, key_BxTxHkxK, value_BxTxHkxK, log_decay_BxTxHk = _project(config, params, x_BxTxD)
    serves, length = np.arange(config.heads) // (config.heads // config.kv_heads), x_BxTxD.shape[1]
    total_BxHxT = np.cumsum(log_decay_BxTxHk, axis=1)[:, :, serves].swapaxes(1, 2)
    past = np.tril(np.ones((length, length), bool))
    decay_BxHxTxS = np.exp(np.where(past, total_BxHxT[..., :, None] - total_BxHxT[..., None, :], -np.inf))
    weight_BxHxTxS = decay_BxHxTxS * np.einsum("bthk,bshk->bhts", query_BxTxHxK, key_BxTxHkxK[:, :, serves])
    mixed_BxTxHxK = np.einsum("bhts,bshk->bthk", weight_BxHxTxS, value_BxTxHkxK[:, :, serves])
    return _output(config, params, x_BxTxD, mixed_BxTxHxK, weight_BxHxTxS.sum(axis=-1).swapaxes(1, 2))


def initial_state(config: ModelConfig, batch: int) -> State:
    """No token seen yet: S [B, Hk, K, K], and the sum of the keys z [B, Hk, K]."""
    shape = (batch, config.kv_heads, config.head_dim)
    return {"S": np.zeros((*shape, config.head_dim)), "z": np.zeros(shape)}


def step(config: ModelConfig, params: Params, x_BxD: np.ndarray, state: State, carried: dict) -> tuple[np.ndarray, State]:
    """One more token: [B, D] and the state -> [B, D] and the next state."""
    query, key, value, log_decay = (array[:, 0] for array in _project(config, params, x_BxD[:, None]))
    kept = np.exp(log_decay)[..., None]
    state = {"S": kept[..., None] * state["S"] + key[..., :, None] * value[..., None, :], "z": kept * state["z"] + key}
    serves = np.arange(config.heads) // (config.heads // config.kv_heads)
    mixed_BxHxK = np.einsum("bhk,bhkv->bhv", query, state["S"][:, serves])
    denominator_BxH = np.einsum("bhk,bhk->bh", query, state["z"][:, serves])
    return _output(config, params, x_BxD[:, None], mixed_BxHxK[:, None], denominator_BxH[:, None])[:, 0], state


def _project(config: ModelConfig, params: Params, x_BxTxD: np.ndarray) -> tuple[np.ndarray, ...]:
    def heads(name: str, count: int) -> np.ndarray:
        return (x_BxTxD @ params[f"{name}.weight"].T).reshape(*x_BxTxD.shape[:2], count, config.head_dim)

    query, key = _feature(config, heads("q_proj", config.heads)), _feature(config, heads("k_proj", config.kv_heads))
    return query / np.sqrt(config.head_dim), key, heads("v_proj", config.kv_heads), _log_decay(config, params, x_BxTxD)


def _feature(config: ModelConfig, z: np.ndarray) -> np.ndarray:
    return np.where(z > 0, z + 1, np.exp(np.minimum(z, 0))) if config.linear_feature_map == "elu1" else z


def _log_decay(config: ModelConfig, params: Params, x_BxTxD: np.ndarray) -> np.ndarray:
    if config.linear_decay == "scalar":
        return -np.logaddexp(0, -(x_BxTxD @ params["decay_proj.weight"].T + params["decay_bias"])) / 16
    head = np.arange(config.kv_heads)
    per_head = np.log1p(-(2.0 ** (-5 - head))) if config.linear_decay == "fixed" else 0.0 * head
    return np.broadcast_to(per_head, (*x_BxTxD.shape[:2], config.kv_heads))


def _output(config: ModelConfig, params: Params, x: np.ndarray, mixed_BxTxHxK: np.ndarray, denominator_BxTxH: np.ndarray) -> np.ndarray:
    if config.linear_normalizer == "denominator":
        normed = mixed_BxTxHxK / (denominator_BxTxH[..., None] + 1e-6)
    else:
        normed = rms_norm(mixed_BxTxHxK, params["norm.weight"], config.norm_eps)
    return (normed.reshape(x.shape) * silu(x @ params["gate_proj.weight"].T)) @ params["o_proj.weight"].T
