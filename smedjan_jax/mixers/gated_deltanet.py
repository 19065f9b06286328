"""Gated DeltaNet (Yang et al., 2024) in the form of Qwen3-Next (2025): the delta rule with a scalar decay per value head.

    S_t = e^{g_t} S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T,  o_t = S_t q_t

The equations of the projections stand in smedjan_common/reference/gated_deltanet.py. A chunk of C positions at once, G the
running sum of g in it, L_ij = e^{G_i - G_j}:

    X = (I + beta * below(K K^T * L))^-1;  U = X beta V;  W = X beta e^G K                      below: under the diagonal
    o = P U + (e^G Q - P W) S^T,  P = lower(Q K^T * L)                                          lower: the diagonal too
    S' = e^{G_C} S + (U - W S^T)^T E,  E = e^{G_C - G} K

g is not bounded, so the exponents are differences, none above 0; what the masks hide is -inf before exp, so that gradients stay finite.

Shapes: B batch, T positions, D width, H value and G key heads of V and K features, F = 2 G K + H V, C chunk; in a chunk [N, B, H, C, K].
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from smedjan_common.config import ModelConfig
from smedjan_common.model.mixers.gated_deltanet import heads
from smedjan_jax.kernels import SHORTEST, around
from smedjan_jax.mixers.chunks import borders, cut, join, matmul, running_sum, scan_states
from smedjan_jax.mixers.conv import causal_conv
from smedjan_jax.mixers.triangular import unit_lower_inverse
from smedjan_jax.modules import Carried, Context, Linear, Params, RMSNorm, State, apply_together, together
from smedjan_jax.products import copies, linear, whole
from smedjan_jax.sharding import over_tensor

Arrays = tuple[jax.Array, ...]

QK_EPS = 1e-6


class GatedDeltaNet(nnx.Module):
    """The mixer `gated-deltanet`: projections, convolution, gated delta rule, norm, gate, output projection."""

    reads = together = ("q_proj", "k_proj", "v_proj", "z_proj", "a_proj", "b_proj")

    def __init__(self, config: ModelConfig, params: Params, name: str, implementation: str = "auto"):
        def linears(*names: str) -> list[Linear]:
            return [Linear(params, f"{name}.{each}_proj") for each in names]

        self.q_proj, self.k_proj, self.v_proj, self.z_proj, self.a_proj, self.b_proj, self.o_proj = linears(
            "q", "k", "v", "z", "a", "b", "o"
        )
        self.conv = Linear(params, f"{name}.conv")
        self.A_log, self.dt_bias = (nnx.data(params[f"{name}.{each}"]) for each in ("A_log", "dt_bias"))
        self.norm = RMSNorm(params, f"{name}.norm", config.norm_eps)
        self.heads = heads(config)
        self.implementation = implementation

    def __call__(self, x: jax.Array, context: Context, carried: Carried) -> tuple[jax.Array, Carried]:
        """Training: all positions at once."""
        return self.mix(self.project(x, context), context, carried)

    def project(self, x: jax.Array, context: Context) -> Arrays:
        """What is convolved [B, T, F], z [B, T, H V], and what makes decay and beta [B, T, H], of x [B, T, D]."""
        linears = together(self)
        plain = all(linear.lora_a is None for linear in linears)
        if plain and around(self.implementation, context.position):  # a matmul each for what kernels read: else they would get copies
            convolved: Any = [each.weight for each in (self.q_proj, self.k_proj, self.v_proj)]
            of_z, of_convolved, of_gates = copies(x, 3)
            gates = apply_together([self.a_proj, self.b_proj], of_gates)
            return linear(of_convolved, convolved, self.q_proj.float8), self.z_proj(of_z), *gates
        q, k, v, z, a, b = apply_together(linears, x)
        return jnp.concatenate([q, k, v], axis=-1), z, a, b

    def mix(self, projected: Arrays, context: Context, carried: Carried) -> tuple[jax.Array, Carried]:
        """What `project` gave, mixed over the positions and projected back to [B, T, D]."""
        features, z, a, b = projected
        B, T, _ = z.shape
        state = jnp.zeros((B, self.heads.values, self.heads.value_dim, self.heads.key_dim), jnp.float32)
        if around(self.implementation, context.position):
            o, _ = self._kernel((*self._convolved(features, context.documents), *self._gates(a, b)), state, context.documents)
            return self._gated(o, z), carried
        convolved, _ = causal_conv(features, whole(self.conv.weight), None, None, context.documents)
        arrays = *self._heads(convolved), *self._gates(a, b)
        if self.implementation == "pallas":
            o, _ = self._kernel(arrays, state, context.documents)
        else:
            core = jax.checkpoint(gated_delta_rule, static_argnums=(3,))  # its C x C matrices would be the largest part of the memory
            o, _ = core(arrays, state, context.documents, min(context.chunk_size, T))
        return self._output(o, z), carried

    def step(self, x: jax.Array, context: Context, state: State, carried: Carried) -> tuple[jax.Array, State, Carried]:
        """Decoding: T new tokens after those that made the state: `window`, what is convolved with them, and `S` [B, H, V, K]."""
        features, z, a, b = self.project(x, context)
        convolved, window = causal_conv(features, whole(self.conv.weight), None, state["window"])
        arrays, T = (*self._heads(convolved), *self._gates(a, b)), x.shape[1]
        if self.implementation == "pallas" and T >= SHORTEST:
            o, S = self._kernel(arrays, state["S"], None)
        elif T == 1:
            o, S = _one(arrays, state["S"])
        else:
            o, S = gated_delta_rule(arrays, state["S"], None, min(context.chunk_size, T))
        return self._output(o, z), {"window": window, "S": S}, carried

    def _kernel(self, arrays: Arrays, state: jax.Array, documents: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        from smedjan_jax.kernels import delta_rule

        return over_tensor(delta_rule.gated_delta_rule, (arrays, state, documents), (2, 1, None), (2, 1))

    def _convolved(self, features: jax.Array, documents: jax.Array | None) -> Arrays:
        """q, k and v as `_heads` gives them, of what is convolved, by a kernel."""
        from smedjan_jax.kernels.conv import Part, conv_silu

        G, H, K, V = self.heads
        taps, keys, values = whole(self.conv.weight), (Part(G, K**-0.5), Part(G, 1.0)), (Part(H),)
        if K == V:
            q, k, v = conv_silu(features, taps, None, documents, keys + values)
        else:  # the kernel cuts what it is given into heads of one size
            ends = self.heads.key_features * 2
            q, k = conv_silu(features[..., :ends], taps[:ends], None, documents, keys)
            (v,) = conv_silu(features[..., ends:], taps[ends:], None, documents, values)
        return *(jnp.repeat(each, H // G, axis=2) if H > G else each for each in (q, k)), v

    def _gated(self, o: jax.Array, z: jax.Array) -> jax.Array:
        """The same as `_output`, by a kernel."""
        from smedjan_jax.kernels.rows import gated_norm

        return self.o_proj(gated_norm(o, z.reshape(o.shape), self.norm.weight, self.norm.eps).reshape(z.shape))

    def _heads(self, convolved: jax.Array) -> Arrays:
        """q and k, of length K^-1/2 and 1, repeated for the value heads, [B, T, H, K], and v [B, T, H, V]."""
        (B, T, _), (G, H, K, V) = convolved.shape, self.heads
        active, ends = jax.nn.silu(convolved.astype(jnp.float32)), self.heads.key_features * 2
        qk, v = active[..., :ends].reshape(B, T, 2 * G, K), active[..., ends:].reshape(B, T, H, V)
        qk = qk * jax.lax.rsqrt(jnp.sum(qk * qk, axis=-1, keepdims=True) + QK_EPS)
        q, k = (jnp.repeat(each.astype(convolved.dtype), H // G, axis=2) for each in (qk[:, :, :G] * K**-0.5, qk[:, :, G:]))
        return q, k, v.astype(convolved.dtype)

    def _gates(self, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The log decay g and beta [B, T, H] in float32."""
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return -jnp.exp(self.A_log) * jax.nn.softplus(a + self.dt_bias), jax.nn.sigmoid(b)

    def _output(self, o: jax.Array, z: jax.Array) -> jax.Array:
        y = self.norm(o.astype(jnp.float32)).reshape(z.shape) * jax.nn.silu(z.astype(jnp.float32))
        return self.o_proj(y.astype(z.dtype))


def gated_delta_rule(arrays: Arrays, state: jax.Array, documents: jax.Array | None, C: int) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, V] in float32 and the state after the last position, in chunks of C (the equations stand above).

    arrays: q, k, v [B, T, H, K], log decay and beta [B, T, H]; state [B, H, V, K] float32; documents [B, T]. Matmuls in the dtype of q.
    """
    q, k, v, log_decay, beta = arrays
    T, dtype = q.shape[1], q.dtype
    q, k, v = (cut(each.astype(jnp.float32), C) for each in (q, k, v))
    log_decay, beta = (cut(each[..., None], C) for each in (log_decay, beta))
    same, reads, writes, keeps = borders(documents, C)
    upto = same & jnp.tril(jnp.ones((C, C), bool))
    total = running_sum(log_decay, upto)
    between = jnp.exp(jnp.where(upto, total - total.swapaxes(-1, -2), -jnp.inf))
    k_transposed, start = k.swapaxes(-1, -2), jnp.exp(total) * reads
    x = unit_lower_inverse(beta * matmul(k, k_transposed, dtype) * between)
    u, w = matmul(x, beta * v, dtype), matmul(x, beta * start * k, dtype)
    scores = matmul(q, k_transposed, dtype) * between
    inner, query = matmul(scores, u, dtype), start * q - matmul(scores, w, dtype)
    # masked before exp: an earlier document's sum may lie so far under the last one's that exp of the difference is infinite
    key = k * jnp.exp(jnp.where(writes > 0, total[..., -1:, :] - total, -jnp.inf))
    change, add = -matmul(w.swapaxes(-1, -2), key, dtype), matmul(u.swapaxes(-1, -2), key, dtype)
    states, last = scan_states(state, jnp.exp(total[..., -1:, :]) * keeps, change, add, dtype)
    return join(inner + matmul(query, states.swapaxes(-1, -2), dtype), T), last


def _one(arrays: Arrays, state: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One position, by the recurrence as it stands, in float32."""
    q, k, v, log_decay, beta = (array[:, 0].astype(jnp.float32) for array in arrays)
    state = state * jnp.exp(log_decay)[..., None, None]
    change = beta[..., None] * (v - jnp.sum(state * k[:, :, None, :], axis=-1))
    state = state + change[..., None] * k[:, :, None, :]
    return jnp.sum(state * q[:, :, None, :], axis=-1)[:, None], state
