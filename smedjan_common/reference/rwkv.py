"""RWKV-7's time mix (Peng et al., 2025, "RWKV-7 Goose").

    x_c = x_t + (x_{t-1} - x_t) * mu_c                               for c in r, w, k, v, a, g;  x_{-1} = 0
    r, k, v = x_r Wr^T, x_k Wk^T, x_v Wv^T;   g = sigmoid(x_g G1^T) G2^T;   a = sigmoid(a0 + x_a A1^T A2^T)
    w = exp(-e^{-1/2} sigmoid(w0 + tanh(x_w W1^T) W2^T))             the decay, in (0.545, 1) for every channel
    v <- v + (v_first - v) * sigmoid(v0 + x_v V1^T V2^T)             after the first layer of this kind, whose v is v_first
    kk = (k * k_k) / |k * k_k| in its head;   k <- k * (1 + (a - 1) * k_a)
    S_t = S_{t-1} Diag(w_t) - (S_{t-1} kk_t) (kk_t * a_t)^T + v_t k_t^T,   o_t = S_t r_t
    y_t = ((GroupNorm(o_t) + (sum_K r_t k_t r_k) v_t) * g_t) Wo^T

Shapes: B batch, T length, D width, H heads of size K (values: V = K), S [B, H, V, K].
"""

import numpy as np

from smedjan_common.model.config import ModelConfig
from smedjan_common.reference.activations import sigmoid

State = dict[str, np.ndarray]
Params = dict[str, np.ndarray]
GROUP_NORM_EPS = 64e-5
DECAY = np.exp(-0.5)


def forward(config: ModelConfig, params: Params, x_BxTxD: np.ndarray, carried: dict[str, np.ndarray]) -> np.ndarray:
    """The whole sequence, [B, T, D] -> [B, T, D]; the first layer writes carried["v_first"], the later ones read it."""
    previous_BxTxD = np.concatenate([np.zeros_like(x_BxTxD[:, :1]), x_BxTxD[:, :-1]], axis=1)
    r, w, k, v, a, b, gate = _project(config, params, x_BxTxD, previous_BxTxD, carried)
    state, outputs = initial_state(config, len(x_BxTxD))["S"], []
    for t in range(x_BxTxD.shape[1]):
        state = _update(state, w[:, t], k[:, t], v[:, t], a[:, t], b[:, t])
        outputs.append(np.einsum("bhvk,bhk->bhv", state, r[:, t]))
    return _output(params, np.stack(outputs, axis=1), r, k, v, gate)


def initial_state(config: ModelConfig, batch: int) -> State:
    """No token seen yet: the token before, [B, D], and S are zero."""
    size = config.rwkv_head_dim
    return {"shift": np.zeros((batch, config.dim)), "S": np.zeros((batch, config.dim // size, size, size))}


def step(config: ModelConfig, params: Params, x_BxD: np.ndarray, state: State, carried: dict[str, np.ndarray]) -> tuple[np.ndarray, State]:
    """One more token: [B, D] and the state -> [B, D] and the next state."""
    r, w, k, v, a, b, gate = _project(config, params, x_BxD, state["shift"], carried)
    new = _update(state["S"], w, k, v, a, b)
    return _output(params, np.einsum("bhvk,bhk->bhv", new, r), r, k, v, gate), {"shift": x_BxD, "S": new}


def _project(config: ModelConfig, params: Params, x: np.ndarray, previous: np.ndarray, carried: dict) -> tuple[np.ndarray, ...]:
    """r, w, k, v, a = -kk, b = kk * a, all [..., H, K], and the gate [..., D]."""

    def mixed(name: str) -> np.ndarray:
        return x + (previous - x) * params[f"x_{name}"]

    def low_rank(name: str, inner: np.ndarray) -> np.ndarray:
        return inner @ params[f"{name}2.weight"].T

    def heads(z: np.ndarray) -> np.ndarray:
        return z.reshape(*z.shape[:-1], -1, config.rwkv_head_dim)

    r, k, v = (mixed(name) @ params[f"{name}_proj.weight"].T for name in "rkv")
    w = np.exp(-DECAY * sigmoid(params["w0"] + low_rank("w", np.tanh(mixed("w") @ params["w1.weight"].T))))
    rate = sigmoid(params["a0"] + low_rank("a", mixed("a") @ params["a1.weight"].T))
    gate = low_rank("g", sigmoid(mixed("g") @ params["g1.weight"].T))
    if "v_first" in carried:
        v = v + (carried["v_first"] - v) * sigmoid(params["v0"] + low_rank("v", mixed("v") @ params["v1.weight"].T))
    else:
        carried["v_first"] = v
    kk = heads(k * params["k_k"])
    kk = kk / np.maximum(np.linalg.norm(kk, axis=-1, keepdims=True), 1e-12)
    k = k * (1 + (rate - 1) * params["k_a"])
    return heads(r), heads(w), heads(k), heads(v), -kk, kk * heads(rate), gate


def _update(S: np.ndarray, w: np.ndarray, k: np.ndarray, v: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """One token: S [B, H, V, K], the rest [B, H, K]."""
    removed_BxHxV = np.einsum("bhvk,bhk->bhv", S, a)
    return S * w[:, :, None, :] + removed_BxHxV[..., None] * b[:, :, None, :] + v[..., None] * k[:, :, None, :]


def _output(params: Params, o: np.ndarray, r: np.ndarray, k: np.ndarray, v: np.ndarray, gate: np.ndarray) -> np.ndarray:
    centred = o - o.mean(axis=-1, keepdims=True)
    normed = centred / np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + GROUP_NORM_EPS)
    y = normed.reshape(gate.shape) * params["ln_x.weight"] + params["ln_x.bias"]
    bonus = np.sum(r * k * params["r_k"], axis=-1, keepdims=True) * v
    return ((y + bonus.reshape(gate.shape)) * gate) @ params["o_proj.weight"].T
