"""Causal softmax attention with RoPE, multi-head or grouped-query (Vaswani et al., 2017; Ainslie et al., 2023).

    o = softmax(q k^T / sqrt(K) + causal) v,  query head h reads key/value head h // (H / Hk)

Options: qk_norm, an RMSNorm over each head (or all) of q and k before they are turned (Qwen3, 2025); window W: position t sees
s with t - W < s <= t (Mistral, 2023); attention_gate: sigmoid(x Wg^T) o goes into the output projection (Qwen3-Next, 2025).

Implementations: "fused" is mx.fast.scaled_dot_product_attention (Metal and CUDA kernels; on a CPU MLX composes it);
"plain" is matmul, softmax, matmul, in float32.

Shapes: B batch, T new positions, L cache length, D width, H query heads, G key/value heads, K head size, R = H / G.
MLX keeps heads before positions, [B, H, T, K]; JAX keeps positions first.
"""

import mlx.core as mx
import mlx.nn as nn

from smedjan_common.config import ModelConfig
from smedjan_common.model.mixers.attention import rope_dims
from smedjan_common.model.rope import turning
from smedjan_mlx.mixers.cache import extend
from smedjan_mlx.modules import Carried, Context, Linear, Params, RMSNorm, State, apply_together, gated, together


class Attention(nn.Module):
    """The mixer `attention`: projections, RoPE, causal attention, output projection."""

    def __init__(self, config: ModelConfig, params: Params, name: str, implementation: str = "auto"):
        super().__init__()
        self.q_proj = Linear(params, f"{name}.q_proj")
        self.k_proj = Linear(params, f"{name}.k_proj")
        self.v_proj = Linear(params, f"{name}.v_proj")
        self.o_proj = Linear(params, f"{name}.o_proj")
        self.together = ("q_proj", "k_proj", "v_proj", *(["gate_proj"] if config.attention_gate else []))
        if config.attention_gate:
            self.gate_proj = Linear(params, f"{name}.gate_proj")
        if config.qk_norm:
            self.q_norm = RMSNorm(params, f"{name}.q_norm", config.norm_eps)
            self.k_norm = RMSNorm(params, f"{name}.k_norm", config.norm_eps)
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.norm_all = config.qk_norm_over == "all"
        self.multiplier = config.attention_multiplier
        self.turning = turning(config, *rope_dims(config)) if rope_dims(config) else None
        self.qk_norm, self.window, self.implementation = config.qk_norm, config.window, implementation

    def __call__(self, x: mx.array, context: Context, carried: Carried) -> tuple[mx.array, Carried]:
        """Training: all positions at once."""
        return self.mix(self.project(x, context), context, carried)

    def project(self, x: mx.array, context: Context) -> tuple[mx.array, ...]:
        """Queries [B, H, T, K], keys and values [B, G, T, K], not yet turned, and a gate [B, T, H K] where there is one, of x."""
        B, T, _ = x.shape
        query, key, value, *gate = apply_together(together(self), x)
        heads, kv_heads = (B, T, self.heads, self.head_dim), (B, T, self.kv_heads, self.head_dim)
        return query.reshape(heads).swapaxes(1, 2), key.reshape(kv_heads).swapaxes(1, 2), value.reshape(kv_heads).swapaxes(1, 2), *gate

    def mix(self, projected: tuple[mx.array, ...], context: Context, carried: Carried) -> tuple[mx.array, Carried]:
        """What `project` gave, mixed over the positions and projected back to [B, T, D]."""
        query, key, value, *gate = projected
        query, key = self._turn(query, key, context)
        return self._output(causal_attention(query, key, value, self.implementation, context.documents, self.window), *gate), carried

    def step(self, x: mx.array, context: Context, state: State, carried: Carried) -> tuple[mx.array, State, Carried]:
        """Decoding: T new tokens after `context.position` earlier ones, whose keys and values are in the ring [B, G, L, K]."""
        query, key, value, *gate = self.project(x, context)
        query, key = self._turn(query, key, context)
        read, seen_BTS, state = extend(state, {"key": key, "value": value}, context, axis=2, window=self.window)
        return self._output(masked_attention(query, read["key"], read["value"], seen_BTS), *gate), state, carried

    def _turn(self, query: mx.array, key: mx.array, context: Context) -> tuple[mx.array, mx.array]:
        """Queries and keys, normalised by head where the model does so, turned by their positions where the layer does so."""
        if self.qk_norm:
            query, key = self._normed(self.q_norm, query), self._normed(self.k_norm, key)
        if self.multiplier:  # scores are divided by sqrt(K) later
            query = query * (self.multiplier * self.head_dim**0.5)
        return (query, key) if self.turning is None else (context.rope(query, self.turning), context.rope(key, self.turning))

    def _normed(self, norm: RMSNorm, x: mx.array) -> mx.array:
        """Over each head, or over all of them together."""
        if not self.norm_all:
            return norm(x)
        B, H, T, K = x.shape
        return norm(x.swapaxes(1, 2).reshape(B, T, H * K)).reshape(B, T, H, K).swapaxes(1, 2)

    def _output(self, out_BHTK: mx.array, gate: mx.array | None = None) -> mx.array:
        B, _, T, _ = out_BHTK.shape
        return self.o_proj(gated(out_BHTK.swapaxes(1, 2).reshape(B, T, self.heads * self.head_dim), gate))


def causal_attention(
    query: mx.array, key: mx.array, value: mx.array, implementation: str = "auto", documents: mx.array | None = None, window: int = 0
) -> mx.array:
    """Attention of every position to itself and the earlier ones of its document, [B, H, T, K]; key and value are [B, G, T, K].

    window: it sees only so many positions, itself included; 0: all. "auto" and "fused" take MLX's own kernel, which exists on every device.
    """
    T, scale = query.shape[2], query.shape[-1] ** -0.5
    if documents is None and not 0 < window < T and implementation != "plain":
        return mx.fast.scaled_dot_product_attention(query, key, value, scale=scale, mask="causal")
    seen = visible(mx.arange(T), T, window)
    if documents is not None:
        seen = seen & (documents[:, :, None] == documents[:, None, :])
    if implementation == "plain":
        return masked_attention(query, key, value, seen)
    return mx.fast.scaled_dot_product_attention(query, key, value, scale=scale, mask=seen if documents is None else seen[:, None])


def visible(at: mx.array, length: int, window: int = 0) -> mx.array:
    """Which of `length` positions those at the positions `at` [T] see, bool [T, L]: itself and earlier ones, at most `window` if not 0."""
    behind_TL = at[:, None] - mx.arange(length)
    return (behind_TL >= 0) & (behind_TL < window) if window else behind_TL >= 0


def masked_attention(query: mx.array, key: mx.array, value: mx.array, seen: mx.array) -> mx.array:
    """The plain form: scores and softmax over the positions that `seen` ([T, L], [B, T, L], [B, G, T, L]) allows, [B, H, T, K]. Both are
    float32, the scores of bfloat16 operands rounded to that, as MLX's products are."""
    B, H, T, K = query.shape
    G = key.shape[1]
    q_BGRTK = query.reshape(B, G, H // G, T, K)
    scores = (q_BGRTK @ key[:, :, None].swapaxes(-1, -2)).astype(mx.float32) * K**-0.5
    seen = seen[:, None, None] if seen.ndim == 3 else seen[:, :, None] if seen.ndim == 4 else seen
    weights = mx.softmax(mx.where(seen, scores, -mx.inf), axis=-1).astype(query.dtype)
    return (weights @ value[:, :, None]).reshape(B, H, T, K)
