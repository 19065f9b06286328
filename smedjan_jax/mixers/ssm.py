"""Mamba-2: a state space model with one decay per head (Dao & Gu, 2024).

    z, (x, B, C), dt = split(u W_in^T);   x, B, C <- silu(causal convolution);   dt <- softplus(dt + dt_bias)
    h_t = e^{-e^{A_log} dt_t} h_{t-1} + B_t (dt_t x_t)^T,  y_t = h_t^T C_t + D x_t
    out = (norm(y * silu(z)) * w) W_out^T

Which is the core of mixers/decay.py with the query C, the key B and the value dt x. Head h reads B and C of group h // (H / G).

Shapes: B batch, T positions, D width, E = H P inner features, H heads, P head size, G groups, N state size.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from smedjan_common.config import ModelConfig
from smedjan_common.model.mixers.ssm import convolved_dim, inner_dim
from smedjan_jax.kernels import SHORTEST, around
from smedjan_jax.mixers.conv import causal_conv
from smedjan_jax.mixers.decay import scalar_decay
from smedjan_jax.modules import Carried, Context, Linear, Params, State
from smedjan_jax.products import copies, whole
from smedjan_jax.sharding import over_tensor

Arrays = tuple[jax.Array, ...]


class Mamba2(nnx.Module):
    """The mixer `ssm`: input projection, convolution, state space model, gate, norm, output projection."""

    reads = ("in_proj",)

    def __init__(self, config: ModelConfig, params: Params, name: str, implementation: str = "auto"):
        self.in_proj = Linear(params, f"{name}.in_proj")
        self.conv = Linear(params, f"{name}.conv")
        self.conv_bias = nnx.data(params[f"{name}.conv_bias"])
        self.A_log = nnx.data(params[f"{name}.A_log"])
        self.dt_bias = nnx.data(params[f"{name}.dt_bias"])
        self.D = nnx.data(params[f"{name}.D"])
        self.norm = GroupRMSNorm(params, f"{name}.norm", config.norm_eps, config.ssm_groups)
        self.out_proj = Linear(params, f"{name}.out_proj")
        self.inner, self.convolved = inner_dim(config), convolved_dim(config)
        self.groups, self.state_dim, self.head_dim = config.ssm_groups, config.ssm_state, config.ssm_head_dim
        self.implementation = implementation

    def __call__(self, x: jax.Array, context: Context, carried: Carried) -> tuple[jax.Array, Carried]:
        """Training: all positions at once."""
        return self.mix(self.project(x, context), context, carried)

    def project(self, x: jax.Array, context: Context) -> Arrays:
        """z [B, T, E], x, B and C together [B, T, E + 2 G N], dt [B, T, H], of x [B, T, D]."""
        weight, bounds = self.in_proj.weight, [self.inner, self.inner + self.convolved]
        plain = isinstance(weight, jax.Array) and not self.in_proj.float8 and self.in_proj.lora_a is None
        if plain and around(self.implementation, context.position):
            parts = jnp.split(weight.astype(x.dtype), bounds)  # a matmul each: of one matmul kernels would get copies
            return tuple(each @ part.T for each, part in zip(copies(x, 3), parts, strict=True))
        return tuple(jnp.split(self.in_proj(x), bounds, axis=-1))

    def mix(self, projected: Arrays, context: Context, carried: Carried) -> tuple[jax.Array, Carried]:
        """What `project` gave, mixed over the positions and projected back to [B, T, D]."""
        return self._mixed(projected, context, {})[0], carried

    def step(self, x: jax.Array, context: Context, state: State, carried: Carried) -> tuple[jax.Array, State, Carried]:
        """Decoding: T new tokens after those that made the state: h [B, H, N, P], and the inputs that the convolution still reads."""
        y, state = self._mixed(self.project(x, context), context, state)
        return y, state, carried

    def _mixed(self, projected: Arrays, context: Context, state: State) -> tuple[jax.Array, State]:
        gate, features, dt = projected
        (B, T, H), G, N, P = dt.shape, self.groups, self.state_dim, self.head_dim
        if around(self.implementation, context.position):
            return self._by_kernels(gate, features, dt, context), {}
        features, window = causal_conv(features, whole(self.conv.weight), self.conv_bias, state.get("window"), context.documents)
        active = jax.nn.silu(features.astype(jnp.float32))
        x, key, query = jnp.split(active, [self.inner, self.inner + G * N], axis=-1)
        x = x.reshape(B, T, G, H // G, P)
        dt = jax.nn.softplus(dt.astype(jnp.float32) + self.dt_bias)
        value, log_decay = x * dt.reshape(B, T, G, H // G, 1), (-jnp.exp(self.A_log) * dt).reshape(B, T, G, H // G)
        query, key = (array.astype(gate.dtype).reshape(B, T, G, *heads, N) for array, heads in ((query, (1,)), (key, ())))
        before = state["state"].reshape(B, G, H // G, N, P) if state else None
        y, after = self._core((query, key, value.astype(gate.dtype), log_decay), context, before)
        y = y[:, :, :, 0].astype(jnp.float32) + self.D.reshape(G, H // G, 1) * x
        gated = y.reshape(B, T, -1) * jax.nn.silu(gate.astype(jnp.float32))
        out = self.out_proj(self.norm(gated).astype(gate.dtype))
        return out, {"state": after.reshape(B, H, N, P), "window": window}

    def _by_kernels(self, gate: jax.Array, features: jax.Array, dt: jax.Array, context: Context) -> jax.Array:
        """The same as `_mixed` from an empty state, all of it in kernels."""
        from smedjan_jax.kernels import scalar_decay
        from smedjan_jax.kernels.conv import Part, conv_silu
        from smedjan_jax.kernels.rows import rowwise
        from smedjan_jax.kernels.special import rsqrt, silu

        (B, T, H), G, N, P = dt.shape, self.groups, self.state_dim, self.head_dim
        E, size = self.inner, math.gcd(self.inner, G * N, 64)
        parts = Part(E // size), Part(G * N // size), Part(G * N // size)
        x, key, query = conv_silu(features, whole(self.conv.weight), self.conv_bias, context.documents, parts)
        dt = jax.nn.softplus(dt.astype(jnp.float32) + self.dt_bias)
        log_decay = (-jnp.exp(self.A_log) * dt).reshape(B, T, G, H // G)
        arrays = query.reshape(B, T, G, 1, N), key.reshape(B, T, G, N), x.reshape(B, T, G, H // G, P), log_decay
        scale = scalar_decay.Scale(dt.reshape(B, T, G, H // G), self.D.reshape(G, H // G))
        y, _ = scalar_decay.scalar_decay(*arrays, None, context.documents, None, scale)
        eps, F, rows = self.norm.eps, E // G, (B, T, G, E // G)

        def function(tiles, parameters, valid):
            (y, z), (weight,) = tiles, parameters
            gated = y * silu(z)
            return (gated * rsqrt(jnp.sum(gated * gated, axis=1, keepdims=True) / F + eps) * weight[None, :],)

        out = rowwise(function, (y.reshape(rows), gate.reshape(rows)), (self.norm.weight.reshape(G, F),), (gate.dtype,))[0]
        return self.out_proj(out.reshape(B, T, E))

    def _core(self, arrays: Arrays, context: Context, before: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Outputs, float32 or in the compute dtype, and the state after them."""
        if self.implementation != "pallas" or (before is not None and arrays[0].shape[1] < SHORTEST):
            query, key, value, log_decay = arrays
            return scalar_decay(query, key, value, log_decay, context.chunk_size, before, context.documents)
        from smedjan_jax.kernels import scalar_decay as kernel

        # values, decays and states over the heads of each group, R; queries and keys are every head's
        return over_tensor(kernel.scalar_decay, (*arrays, before, context.documents), (None, None, 3, 3, 2, None), (4, 2))


class GroupRMSNorm(nnx.Module):
    """RMSNorm over each of `groups` equal parts of the features, with one weight per feature."""

    def __init__(self, params: Params, name: str, eps: float, groups: int):
        self.weight = nnx.data(params[f"{name}.weight"])
        self.eps, self.groups = eps, groups

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, T, E] float32 -> [B, T, E]."""
        parts = x.reshape(*x.shape[:2], self.groups, -1)
        normed = parts * jax.lax.rsqrt(jnp.mean(parts * parts, axis=-1, keepdims=True) + self.eps)
        return normed.reshape(x.shape) * self.weight
