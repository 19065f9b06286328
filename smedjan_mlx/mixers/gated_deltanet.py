"""Gated DeltaNet (Yang et al., 2024) in the form of Qwen3-Next (2025): the delta rule with a scalar decay per value head.

    S_t = e^{g_t} S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T,  o_t = S_t q_t

The equations of the projections stand in smedjan_common/reference/gated_deltanet.py. A chunk of C positions at once, G the
running sum of g in it, L_ij = e^{G_i - G_j}:

    X = (I + beta * below(K K^T * L))^-1;  U = X beta V;  W = X beta e^G K                      below: under the diagonal
    o = P U + (e^G Q - P W) S^T,  P = lower(Q K^T * L)                                          lower: the diagonal too
    S' = e^{G_C} S + (U - W S^T)^T E,  E = e^{G_C - G} K

g is not bounded, so the exponents are differences, none above 0; what the masks hide is -inf before exp, so that gradients stay finite.

Shapes: B batch, T positions, D width, H value and G key heads of V and K features, F = 2 G K + H V, C chunk; in a chunk
[B, H, N, C, K]. MLX keeps heads before positions, [B, H, T, K]; JAX keeps positions first.
"""

import mlx.core as mx
import mlx.nn as nn

from smedjan_common.config import ModelConfig
from smedjan_common.model.mixers.gated_deltanet import heads
from smedjan_mlx.mixers.chunks import borders, cut, join, matmul, running_sum, scan_states
from smedjan_mlx.mixers.conv import causal_conv
from smedjan_mlx.mixers.triangular import unit_lower_inverse
from smedjan_mlx.modules import Carried, Context, Linear, Params, RMSNorm, State, apply_together, together

Arrays = tuple[mx.array, ...]

QK_EPS = 1e-6


class GatedDeltaNet(nn.Module):
    """The mixer `gated-deltanet`: projections, convolution, gated delta rule, norm, gate, output projection."""

    together = ("q_proj", "k_proj", "v_proj", "z_proj", "a_proj", "b_proj")

    def __init__(self, config: ModelConfig, params: Params, name: str, implementation: str = "auto"):
        super().__init__()

        def linears(*names: str) -> list[Linear]:
            return [Linear(params, f"{name}.{each}_proj") for each in names]

        self.q_proj, self.k_proj, self.v_proj, self.z_proj, self.a_proj, self.b_proj, self.o_proj = linears(
            "q", "k", "v", "z", "a", "b", "o"
        )
        self.conv = Linear(params, f"{name}.conv")
        self.A_log, self.dt_bias = (params[f"{name}.{each}"] for each in ("A_log", "dt_bias"))
        self.norm = RMSNorm(params, f"{name}.norm", config.norm_eps)
        self.heads = heads(config)

    def __call__(self, x: mx.array, context: Context, carried: Carried) -> tuple[mx.array, Carried]:
        """Training: all positions at once."""
        return self.mix(self.project(x, context), context, carried)

    def project(self, x: mx.array, context: Context) -> Arrays:
        """What is convolved [B, T, F], z [B, T, H V], and what makes decay and beta [B, T, H], of x [B, T, D]."""
        q, k, v, z, a, b = apply_together(together(self), x)
        return mx.concatenate([q, k, v], axis=-1), z, a, b

    def mix(self, projected: Arrays, context: Context, carried: Carried) -> tuple[mx.array, Carried]:
        """What `project` gave, mixed over the positions and projected back to [B, T, D]."""
        features, z, a, b = projected
        convolved, _ = causal_conv(features, self.conv.weight, None, None, context.documents)
        B, T, _ = z.shape
        state = mx.zeros((B, self.heads.values, self.heads.value_dim, self.heads.key_dim), mx.float32)
        core = mx.checkpoint(gated_delta_rule)  # its C x C matrices would be the largest part of the memory
        o, _ = core((*self._heads(convolved), *self._gates(a, b)), state, context.documents, min(context.chunk_size, T))
        return self._output(o, z), carried

    def step(self, x: mx.array, context: Context, state: State, carried: Carried) -> tuple[mx.array, State, Carried]:
        """Decoding: T new tokens after those that made the state: `window`, what is convolved with them, and `S` [B, H, V, K]."""
        features, z, a, b = self.project(x, context)
        convolved, window = causal_conv(features, self.conv.weight, None, state["window"])
        arrays, T = (*self._heads(convolved), *self._gates(a, b)), x.shape[1]
        if T == 1:
            o, S = _one(arrays, state["S"])
        else:
            o, S = gated_delta_rule(arrays, state["S"], None, min(context.chunk_size, T))
        return self._output(o, z), {"window": window, "S": S}, carried

    def _heads(self, convolved: mx.array) -> Arrays:
        """q and k, of length K^-1/2 and 1, repeated for the value heads, [B, H, T, K], and v [B, H, T, V]."""
        (B, T, _), (G, H, K, V) = convolved.shape, self.heads
        active, ends = nn.silu(convolved.astype(mx.float32)), self.heads.key_features * 2
        qk, v = (part.reshape(B, T, -1, size).swapaxes(1, 2) for part, size in ((active[..., :ends], K), (active[..., ends:], V)))
        qk = qk * mx.rsqrt(mx.sum(qk * qk, axis=-1, keepdims=True) + QK_EPS)
        q, k = (mx.repeat(each.astype(convolved.dtype), H // G, axis=1) for each in (qk[:, :G] * K**-0.5, qk[:, G:]))
        return q, k, v.astype(convolved.dtype)

    def _gates(self, a: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
        """The log decay g and beta [B, H, T] in float32."""
        a, b = (each.swapaxes(1, 2).astype(mx.float32) for each in (a, b))
        return -mx.exp(self.A_log)[:, None] * mx.logaddexp(a + self.dt_bias[:, None], 0.0), mx.sigmoid(b)

    def _output(self, o: mx.array, z: mx.array) -> mx.array:
        y = self.norm(o).swapaxes(1, 2).reshape(z.shape) * nn.silu(z.astype(mx.float32))
        return self.o_proj(y.astype(z.dtype))


def gated_delta_rule(arrays: Arrays, state: mx.array, documents: mx.array | None, C: int) -> tuple[mx.array, mx.array]:
    """o [B, H, T, V] in float32 and the state after the last position, in chunks of C (the equations stand above).

    arrays: q, k, v [B, H, T, K], log decay and beta [B, H, T]; state [B, H, V, K] float32; documents [B, T]. Matmuls in the dtype of q.
    """
    q, k, v, log_decay, beta = arrays
    T, dtype = q.shape[2], q.dtype
    q, k, v = (cut(each.astype(mx.float32), C) for each in (q, k, v))
    log_decay, beta = (cut(each[..., None], C) for each in (log_decay, beta))
    same, reads, writes, keeps = borders(documents, C)
    upto = same & mx.tril(mx.ones((C, C), dtype=mx.bool_))
    total = running_sum(log_decay, upto)
    between = mx.exp(mx.where(upto, total - total.swapaxes(-1, -2), -mx.inf))
    k_transposed, start = k.swapaxes(-1, -2), mx.exp(total) * reads
    x = unit_lower_inverse(beta * matmul(k, k_transposed, dtype) * between)
    u, w = matmul(x, beta * v, dtype), matmul(x, beta * start * k, dtype)
    scores = matmul(q, k_transposed, dtype) * between
    inner, query = matmul(scores, u, dtype), start * q - matmul(scores, w, dtype)
    # masked before exp: an earlier document's sum may lie so far under the last one's that exp of the difference is infinite
    key = k * mx.exp(mx.where(writes > 0, total[..., -1:, :] - total, -mx.inf))
    change, add = -matmul(w.swapaxes(-1, -2), key, dtype), matmul(u.swapaxes(-1, -2), key, dtype)
    states, last = scan_states(state, mx.exp(total[..., -1:, :]) * keeps, change, add, dtype)
    return join(inner + matmul(query, states.swapaxes(-1, -2), dtype), T), last


def _one(arrays: Arrays, state: mx.array) -> tuple[mx.array, mx.array]:
    """One position, by the recurrence as it stands, in float32."""
    q, k, v, log_decay, beta = (array[:, :, 0].astype(mx.float32) for array in arrays)
    state = state * mx.exp(log_decay)[..., None, None]
    change = beta[..., None] * (v - mx.sum(state * k[:, :, None, :], axis=-1))
    state = state + change[..., None] * k[:, :, None, :]
    return mx.sum(state * q[:, :, None, :], axis=-1)[:, :, None], state
