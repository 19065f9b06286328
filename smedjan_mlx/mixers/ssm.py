"""Mamba-2: a state space model with one decay per head (Dao & Gu, 2024).

    z, (x, B, C), dt = split(u W_in^T);   x, B, C <- silu(causal convolution);   dt <- softplus(dt + dt_bias)
    h_t = e^{-e^{A_log} dt_t} h_{t-1} + B_t (dt_t x_t)^T,  y_t = h_t^T C_t + D x_t
    out = (norm(y * silu(z)) * w) W_out^T

Which is the core of mixers/decay.py with the query C, the key B and the value dt x. Head h reads B and C of group h // (H / G).

Shapes: B batch, T positions, D width, E = H P inner features, H heads, P head size, G groups, N state size.
"""

import mlx.core as mx
import mlx.nn as nn

from smedjan_common.config import ModelConfig
from smedjan_common.model.mixers.ssm import convolved_dim, inner_dim
from smedjan_mlx.mixers.conv import causal_conv
from smedjan_mlx.mixers.decay import scalar_decay
from smedjan_mlx.modules import Carried, Context, Linear, Params, State

Arrays = tuple[mx.array, ...]


class Mamba2(nn.Module):
    """The mixer `ssm`: input projection, convolution, state space model, gate, norm, output projection."""

    def __init__(self, config: ModelConfig, params: Params, name: str, implementation: str = "auto"):
        super().__init__()
        self.in_proj = Linear(params, f"{name}.in_proj")
        self.conv = Linear(params, f"{name}.conv")
        self.conv_bias = params[f"{name}.conv_bias"]
        self.A_log = params[f"{name}.A_log"]
        self.dt_bias = params[f"{name}.dt_bias"]
        self.D = params[f"{name}.D"]
        self.norm = GroupRMSNorm(params, f"{name}.norm", config.norm_eps, config.ssm_groups)
        self.out_proj = Linear(params, f"{name}.out_proj")
        self.inner, self.convolved = inner_dim(config), convolved_dim(config)
        self.groups, self.state_dim, self.head_dim = config.ssm_groups, config.ssm_state, config.ssm_head_dim

    def __call__(self, x: mx.array, context: Context, carried: Carried) -> tuple[mx.array, Carried]:
        """Training: all positions at once."""
        return self.mix(self.project(x, context), context, carried)

    def project(self, x: mx.array, context: Context) -> Arrays:
        """z [B, T, E], x, B and C together [B, T, E + 2 G N], dt [B, T, H], of x [B, T, D]."""
        return tuple(mx.split(self.in_proj(x), [self.inner, self.inner + self.convolved], axis=-1))

    def mix(self, projected: Arrays, context: Context, carried: Carried) -> tuple[mx.array, Carried]:
        """What `project` gave, mixed over the positions and projected back to [B, T, D]."""
        return self._mixed(projected, context, {})[0], carried

    def step(self, x: mx.array, context: Context, state: State, carried: Carried) -> tuple[mx.array, State, Carried]:
        """Decoding: T new tokens after those that made the state: h [B, H, N, P], and the inputs that the convolution still reads."""
        y, state = self._mixed(self.project(x, context), context, state)
        return y, state, carried

    def _mixed(self, projected: Arrays, context: Context, state: State) -> tuple[mx.array, State]:
        gate, features, dt = projected
        (B, T, H), G, N, P = dt.shape, self.groups, self.state_dim, self.head_dim
        features, window = causal_conv(features, self.conv.weight, self.conv_bias, state.get("window"), context.documents)
        active = nn.silu(features.astype(mx.float32))
        x, key, query = mx.split(active, [self.inner, self.inner + G * N], axis=-1)
        x = x.reshape(B, T, G, H // G, P)
        dt = nn.softplus(dt.astype(mx.float32) + self.dt_bias)
        value, log_decay = x * dt.reshape(B, T, G, H // G, 1), (-mx.exp(self.A_log) * dt).reshape(B, T, G, H // G)
        query, key = (array.astype(gate.dtype).reshape(B, T, G, *heads, N) for array, heads in ((query, (1,)), (key, ())))
        before = state["state"].reshape(B, G, H // G, N, P) if state else None
        y, after = scalar_decay(query, key, value.astype(gate.dtype), log_decay, context.chunk_size, before, context.documents)
        y = y[:, :, :, 0] + self.D.reshape(G, H // G, 1) * x
        gated = y.reshape(B, T, -1) * nn.silu(gate.astype(mx.float32))
        out = self.out_proj(self.norm(gated).astype(gate.dtype))
        return out, {"state": after.reshape(B, H, N, P), "window": window}


class GroupRMSNorm(nn.Module):
    """RMSNorm over each of `groups` equal parts of the features, with one weight per feature."""

    def __init__(self, params: Params, name: str, eps: float, groups: int):
        super().__init__()
        self.weight = params[f"{name}.weight"]
        self.eps, self.groups = eps, groups

    def __call__(self, x: mx.array) -> mx.array:
        """x [B, T, E] float32 -> [B, T, E]."""
        if self.groups == 1:  # the kernel sums up the gradient of the weight too
            return mx.fast.rms_norm(x, self.weight, self.eps)
        parts = x.reshape(*x.shape[:2], self.groups, -1)
        return mx.fast.rms_norm(parts, None, self.eps).reshape(x.shape) * self.weight
