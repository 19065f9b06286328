"""Causal softmax attention with RoPE, multi-head or grouped-query (Vaswani et al., 2017; Ainslie et al., 2023).

    o = softmax(q k^T / sqrt(K) + causal) v,  query head h reads key/value head h // (H / Hk)

Options: qk_norm, an RMSNorm over each head (or all) of q and k before they are turned (Qwen3, 2025); window W: position t sees
s with t - W < s <= t (Mistral, 2023); attention_gate: sigmoid(x Wg^T) o goes into the output projection (Qwen3-Next, 2025).

Implementations: "fused" is cuDNN's flash attention (NVIDIA GPU, bf16); "plain" is matmul, softmax, matmul, in float32. "kernel" is for
decoders: one new token's attention by kernels/decode_attention.py, several tokens' as ever.

Shapes: B batch, T new positions, L cache length, D width, H query heads, G key/value heads, K head size, R = H / G.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from smedjan_common.config import ModelConfig
from smedjan_common.errors import ConfigError
from smedjan_common.model.mixers.attention import rope_dims
from smedjan_common.model.rope import turning
from smedjan_jax import sharding
from smedjan_jax.mixers import cudnn
from smedjan_jax.mixers.cache import extend
from smedjan_jax.modules import Carried, Context, Linear, Params, RMSNorm, State, apply_together, gated, together


class Attention(nnx.Module):
    """The mixer `attention`: projections, RoPE, causal attention, output projection."""

    def __init__(self, config: ModelConfig, params: Params, name: str, implementation: str = "auto"):
        self.q_proj = Linear(params, f"{name}.q_proj")
        self.k_proj = Linear(params, f"{name}.k_proj")
        self.v_proj = Linear(params, f"{name}.v_proj")
        self.o_proj = Linear(params, f"{name}.o_proj")
        self.reads = self.together = ("q_proj", "k_proj", "v_proj", *(["gate_proj"] if config.attention_gate else []))
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

    def __call__(self, x: jax.Array, context: Context, carried: Carried) -> tuple[jax.Array, Carried]:
        """Training: all positions at once."""
        return self.mix(self.project(x, context), context, carried)

    def project(self, x: jax.Array, context: Context) -> tuple[jax.Array, ...]:
        """Queries [B, T, H, K], keys and values [B, T, G, K], not yet turned, and a gate [B, T, H K] where there is one, of x."""
        B, T, _ = x.shape
        query, key, value, *gate = apply_together(together(self), x)
        heads, kv_heads = (B, T, self.heads, self.head_dim), (B, T, self.kv_heads, self.head_dim)
        return query.reshape(heads), key.reshape(kv_heads), value.reshape(kv_heads), *gate

    def mix(self, projected: tuple[jax.Array, ...], context: Context, carried: Carried) -> tuple[jax.Array, Carried]:
        """What `project` gave, mixed over the positions and projected back to [B, T, D]."""
        query, key, value, *gate = projected
        query, key = self._turn(query, key, context)
        return self._output(causal_attention(query, key, value, self.implementation, context.documents, self.window), *gate), carried

    def step(self, x: jax.Array, context: Context, state: State, carried: Carried) -> tuple[jax.Array, State, Carried]:
        """Decoding: T new tokens after `context.position` earlier ones, whose keys and values are in the ring [B, G, L, K]."""
        query, key, value, *gate = self.project(x, context)
        query, key = self._turn(query, key, context)
        if self.implementation == "kernel" and x.shape[1] == 1:
            out, state = self._looked_up(query, {"key": key[:, 0], "value": value[:, 0]}, state, context)
            return self._output(out, *gate), state, carried
        new = {"key": key.swapaxes(1, 2), "value": value.swapaxes(1, 2)}
        read, seen_BTS, state = extend(state, new, context, axis=2, window=self.window)
        mixed = masked_attention(query, read["key"].swapaxes(1, 2), read["value"].swapaxes(1, 2), seen_BTS)
        return self._output(mixed, *gate), state, carried

    def _looked_up(self, query: jax.Array, new: State, state: State, context: Context) -> tuple[jax.Array, State]:
        """One new token's attention by the kernel, [B, 1, H, K], and the ring with its key and value, [B, G, K] each, in it."""
        from smedjan_jax.kernels.decode_attention import attend

        B, _, H, K = query.shape
        G, L = state["key"].shape[1:3]
        assert context.position is not None
        active = jnp.ones(B, bool) if context.active is None else context.active
        pairs = ((arrays["key"], arrays["value"]) for arrays in (new, state))
        out, (key, value) = attend(query.reshape(B, G, H // G, K), *pairs, context.position, active, min(self.window or L, L))
        return out.reshape(B, 1, H, K), {"key": key, "value": value}

    def _turn(self, query: jax.Array, key: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
        """Queries and keys, normalised by head where the model does so, turned by their positions where the layer does so."""
        if self.qk_norm:
            query, key = self._normed(self.q_norm, query), self._normed(self.k_norm, key)
        if self.multiplier:  # scores are divided by sqrt(K) later
            query = query * (self.multiplier * self.head_dim**0.5)
        return (query, key) if self.turning is None else (context.rope(query, self.turning), context.rope(key, self.turning))

    def _normed(self, norm: RMSNorm, x: jax.Array) -> jax.Array:
        """Over each head, or over all of them together."""
        if not self.norm_all:
            return norm(x)
        B, T, _, _ = x.shape
        return norm(x.reshape(B, T, -1)).reshape(x.shape)

    def _output(self, out_BTHK: jax.Array, gate: jax.Array | None = None) -> jax.Array:
        B, T, _, _ = out_BTHK.shape
        return self.o_proj(gated(out_BTHK.reshape(B, T, self.heads * self.head_dim), gate))


def causal_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, implementation: str = "auto", documents: jax.Array | None = None, window: int = 0
) -> jax.Array:
    """Attention of every position to itself and the earlier ones of its document, [B, T, H, K]; key and value are [B, T, G, K].

    window: it sees only so many positions, itself included; 0: all.
    Raises ConfigError when "fused" is asked for where it cannot run; "auto" takes it wherever it can, and "reproducible" with a backward
    pass that gives the same bits every time.
    """
    return sharding.over_heads(functools.partial(_attend, implementation, window), (query, key, value), documents)


def _attend(implementation: str, window: int, query: jax.Array, key: jax.Array, value: jax.Array, documents: jax.Array | None) -> jax.Array:
    if implementation == "fused":
        refuse_fused(query)
    if implementation == "plain" or cudnn.obstacle(query):
        seen = visible(jnp.arange(query.shape[1]), query.shape[1], window)
        if documents is not None:
            seen = seen & (documents[:, :, None] == documents[:, None, :])
        return masked_attention(query, key, value, seen)
    return cudnn.attention(query, key, value, documents, window, implementation == "reproducible")


def refuse_fused(query: jax.Array | jax.ShapeDtypeStruct) -> None:
    """Raises ConfigError where cuDNN's attention cannot take such queries."""
    if obstacle := cudnn.obstacle(query):
        raise ConfigError("--attention fused cannot run here.", obstacle, "Take --attention auto or plain.")


def visible(at: jax.Array, length: int, window: int = 0) -> jax.Array:
    """Which of `length` positions those at the positions `at` [T] see, bool [T, L]: itself and earlier ones, at most `window` if not 0."""
    behind_TL = at[:, None] - jnp.arange(length)
    return (behind_TL >= 0) & (behind_TL < window) if window else behind_TL >= 0


def masked_attention(query: jax.Array, key: jax.Array, value: jax.Array, seen: jax.Array) -> jax.Array:
    """The plain form: float32 scores and softmax over the positions that `seen` ([T, L], [B, T, L], [B, G, T, L]) allows, [B, T, H, K]."""
    B, T, H, K = query.shape
    G = key.shape[2]
    q_BTGRK = query.reshape(B, T, G, H // G, K)
    scores = jnp.einsum("btgrk,blgk->bgrtl", q_BTGRK, key, preferred_element_type=jnp.float32) * K**-0.5
    seen = seen[:, None, None] if seen.ndim == 3 else seen[:, :, None] if seen.ndim == 4 else seen
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1).astype(query.dtype)
    return jnp.einsum("bgrtl,blgk->btgrk", weights, value).reshape(B, T, H, K)
