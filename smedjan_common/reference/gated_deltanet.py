"""Gated DeltaNet (Yang et al., 2024) in the form of Qwen3-Next (2025): the delta rule with a scalar decay per value head.

    [q; k; v] = silu(causal depthwise convolution of [x Wq^T; x Wk^T; x Wv^T] over W taps);  z = x Wz^T
    q, k <- q / sqrt(|q|^2 + 1e-6), k / sqrt(|k|^2 + 1e-6) in their heads;   q <- q / sqrt(K)
    g = -exp(A_log) softplus(x Wa^T + dt_bias);   beta = sigmoid(x Wb^T)            one number per value head
    S_t = e^{g_t} S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T,   o_t = S_t q_t
    y_t = (RMSNorm(o_t) * silu(z_t)) Wo^T                                           the norm per head, one weight [V] for all

Value head h reads key head h // (H / Hk). Shapes: B batch, T length, D width, H value and Hk key heads of V and K features,
W taps, F = 2 Hk K + H V convolved features, S [B, H, V, K].
"""

import numpy as np

from smedjan_common.model.config import ModelConfig
from smedjan_common.model.mixers.gated_deltanet import heads
from smedjan_common.reference.activations import sigmoid, silu
from smedjan_common.reference.norm import rms_norm

State = dict[str, np.ndarray]
Params = dict[str, np.ndarray]
NORM_EPS = 1e-6


def forward(config: ModelConfig, params: Params, x_BxTxD: np.ndarray, carried: dict[str, np.ndarray]) -> np.ndarray:
    """The whole sequence, [B, T, D] -> [B, T, D]."""
    state, length = initial_state(config, len(x_BxTxD)), x_BxTxD.shape[1]
    before_BxTxF = np.concatenate([state["window"], _convolved_features(params, x_BxTxD)], axis=1)
    seen_BxTxFxW = np.stack([before_BxTxF[:, tap : tap + length] for tap in range(config.conv_width)], axis=-1)
    q, k, v = _heads(config, silu(np.sum(seen_BxTxFxW * params["conv.weight"], axis=-1)))
    decay, beta = _gates(params, x_BxTxD)
    S, outputs = state["S"], []
    for t in range(length):
        S = _update(S, decay[:, t], beta[:, t], k[:, t], v[:, t])
        outputs.append(np.einsum("bhvk,bhk->bhv", S, q[:, t]))
    return _output(config, params, np.stack(outputs, axis=1), x_BxTxD)


def initial_state(config: ModelConfig, batch: int) -> State:
    """No token seen yet: the inputs of the convolution before, [B, W - 1, F], and S are zero."""
    own = heads(config)
    S = np.zeros((batch, own.values, own.value_dim, own.key_dim))
    return {"window": np.zeros((batch, config.conv_width - 1, own.convolved)), "S": S}


def step(config: ModelConfig, params: Params, x_BxD: np.ndarray, state: State, carried: dict[str, np.ndarray]) -> tuple[np.ndarray, State]:
    """One more token: [B, D] and the state -> [B, D] and the next state."""
    window_BxWxF = np.concatenate([state["window"], _convolved_features(params, x_BxD)[:, None]], axis=1)
    q, k, v = _heads(config, silu(np.einsum("bwf,fw->bf", window_BxWxF, params["conv.weight"])))
    S = _update(state["S"], *_gates(params, x_BxD), k, v)
    return _output(config, params, np.einsum("bhvk,bhk->bhv", S, q), x_BxD), {"window": window_BxWxF[:, 1:], "S": S}


def _convolved_features(params: Params, x: np.ndarray) -> np.ndarray:
    return np.concatenate([x @ params[f"{name}_proj.weight"].T for name in "qkv"], axis=-1)


def _heads(config: ModelConfig, features: np.ndarray) -> tuple[np.ndarray, ...]:
    """q, k [..., H, K] and v [..., H, V] of the convolved features [..., F], normalised and repeated for the value heads."""
    own = heads(config)
    split = np.split(features, [own.key_features, 2 * own.key_features], axis=-1)
    sizes = (own.key_dim, own.key_dim, own.value_dim)
    q, k, v = (part.reshape(*part.shape[:-1], -1, size) for part, size in zip(split, sizes, strict=True))
    q, k = (part / np.sqrt(np.sum(part * part, axis=-1, keepdims=True) + NORM_EPS) for part in (q, k))
    q, k = (np.repeat(part, own.values // own.keys, axis=-2) for part in (q, k))
    return q / np.sqrt(own.key_dim), k, v


def _gates(params: Params, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The decay e^g and beta, [..., H]."""
    softplus = np.logaddexp(0, x @ params["a_proj.weight"].T + params["dt_bias"])
    return np.exp(-np.exp(params["A_log"]) * softplus), sigmoid(x @ params["b_proj.weight"].T)


def _update(S: np.ndarray, decay: np.ndarray, beta: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """One token: S [B, H, V, K], decay and beta [B, H], k [B, H, K], v [B, H, V]."""
    S = S * decay[..., None, None]
    correction_BxHxV = (v - np.einsum("bhvk,bhk->bhv", S, k)) * beta[..., None]
    return S + correction_BxHxV[..., None] * k[:, :, None, :]


def _output(config: ModelConfig, params: Params, o: np.ndarray, x: np.ndarray) -> np.ndarray:
    y = rms_norm(o, params["norm.weight"], config.norm_eps).reshape(*x.shape[:-1], -1)
    return (y * silu(x @ params["z_proj.weight"].T)) @ params["o_proj.weight"].T
