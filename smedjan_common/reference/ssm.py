"""Mamba-2 (Dao & Gu, 2024): a state space model with one decay per head.

    z, u, dt = split(x W_in^T);   x, B, C = split(silu(conv(u)));   conv_t = bias + sum_j w_j u_{t-W+1+j}, nothing before the first token
    dt <- softplus(dt + dt_bias);   g = -e^{A_log} dt
    h_t = e^{g_t} h_{t-1} + dt_t B_t x_t^T                  y_t = h_t^T C_t + D x_t
        = sum_{s<=t} e^{g_{s+1} + … + g_t} dt_s (C_t . B_s) x_s + D x_t
    out = (norm(y * silu(z)) * w_norm) W_out^T              the mean of the norm is taken over a group's features

The gate comes before the norm. Head h reads B and C of group h // (H / G). Shapes: B batch, T and S length, E = H P inner features,
H heads of P features, G groups, N state features, W taps.
"""

import numpy as np

from smedjan_common.model.config import ModelConfig
from smedjan_common.reference.activations import silu
from smedjan_common.reference.norm import rms_norm

State = dict[str, np.ndarray]
Params = dict[str, np.ndarray]


def forward(config: ModelConfig, params: Params, x_BxTxD: np.ndarray, carried: dict) -> np.ndarray:
    """The whole sequence at once, [B, T, D] -> [B, T, D]."""
    length = x_BxTxD.shape[1]
    gate, features, time = _project(config, params, x_BxTxD)
    x_BxTxHxP, B_BxTxHxN, C_BxTxHxN = _convolve(config, params, _window(config, len(x_BxTxD)), features)
    dt_BxTxH, log_decay_BxTxH = _time(params, time)
    total_BxHxT = np.cumsum(log_decay_BxTxH, axis=1).swapaxes(1, 2)
    past = np.tril(np.ones((length, length), bool))
    decay_BxHxTxS = np.exp(np.where(past, total_BxHxT[..., :, None] - total_BxHxT[..., None, :], -np.inf))
    weight_BxHxTxS = decay_BxHxTxS * np.einsum("bthn,bshn->bhts", C_BxTxHxN, B_BxTxHxN)
    y_BxTxHxP = np.einsum("bhts,bsh,bshp->bthp", weight_BxHxTxS, dt_BxTxH, x_BxTxHxP)
    return _output(config, params, y_BxTxHxP + params["D"][:, None] * x_BxTxHxP, gate)


def initial_state(config: ModelConfig, batch: int) -> State:
    """No token seen yet: h [B, H, N, P] and the last W - 1 inputs of the convolution."""
    shape = (batch, _inner(config) // config.ssm_head_dim, config.ssm_state, config.ssm_head_dim)
    return {"h": np.zeros(shape), "window": _window(config, batch)}


def step(config: ModelConfig, params: Params, x_BxD: np.ndarray, state: State, carried: dict) -> tuple[np.ndarray, State]:
    """One more token: [B, D] and the state -> [B, D] and the next state."""
    gate, features, time = _project(config, params, x_BxD[:, None])
    x_BxHxP, B_BxHxN, C_BxHxN = (array[:, 0] for array in _convolve(config, params, state["window"], features))
    dt_BxH, log_decay_BxH = (array[:, 0] for array in _time(params, time))
    added = np.einsum("bh,bhn,bhp->bhnp", dt_BxH, B_BxHxN, x_BxHxP)
    h = np.exp(log_decay_BxH)[..., None, None] * state["h"] + added
    y_BxHxP = np.einsum("bhnp,bhn->bhp", h, C_BxHxN) + params["D"][:, None] * x_BxHxP
    window = np.concatenate([state["window"], features], axis=1)[:, 1:]
    return _output(config, params, y_BxHxP[:, None], gate)[:, 0], {"h": h, "window": window}


def _inner(config: ModelConfig) -> int:
    return config.ssm_expand * config.dim


def _window(config: ModelConfig, batch: int) -> np.ndarray:
    return np.zeros((batch, config.conv_width - 1, _inner(config) + 2 * config.ssm_groups * config.ssm_state))


def _project(config: ModelConfig, params: Params, x_BxTxD: np.ndarray) -> list[np.ndarray]:
    """z [B, T, E], what is convolved [B, T, E + 2 G N], dt [B, T, H]."""
    heads = _inner(config) // config.ssm_head_dim
    return np.split(x_BxTxD @ params["in_proj.weight"].T, [_inner(config), -heads], axis=-1)


def _convolve(config: ModelConfig, params: Params, window: np.ndarray, features_BxTxF: np.ndarray) -> tuple[np.ndarray, ...]:
    """x [B, T, H, P], and B and C [B, T, H, N] of each head's group."""
    batch, length, _ = features_BxTxF.shape
    padded = np.concatenate([window, features_BxTxF], axis=1)
    taps = np.stack([padded[:, tap : tap + length] for tap in range(config.conv_width)], axis=-1)
    mixed = (taps * params["conv.weight"]).sum(axis=-1) + params["conv_bias"]
    x, B, C = np.split(silu(mixed), np.cumsum([_inner(config), config.ssm_groups * config.ssm_state]), axis=-1)
    heads = _inner(config) // config.ssm_head_dim
    reads = np.arange(heads) // (heads // config.ssm_groups)
    B, C = (array.reshape(batch, length, config.ssm_groups, config.ssm_state)[:, :, reads] for array in (B, C))
    return x.reshape(batch, length, heads, config.ssm_head_dim), B, C


def _time(params: Params, time_BxTxH: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """dt and the log decay, [B, T, H]."""
    dt = np.logaddexp(0, time_BxTxH + params["dt_bias"])
    return dt, -np.exp(params["A_log"]) * dt


def _output(config: ModelConfig, params: Params, y_BxTxHxP: np.ndarray, gate_BxTxE: np.ndarray) -> np.ndarray:
    gated = y_BxTxHxP.reshape(gate_BxTxE.shape) * silu(gate_BxTxE)
    groups = gated.reshape(*gated.shape[:2], config.ssm_groups, -1)
    normed = rms_norm(groups, np.ones(groups.shape[-1]), config.norm_eps).reshape(gated.shape)
    return (normed * params["norm.weight"]) @ params["out_proj.weight"].T
