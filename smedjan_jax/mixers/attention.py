"""Causal softmax attention with RoPE, multi-head or grouped-query (Vaswani et al., 2017; Ainslie et al., 2023).

    o = softmax(q k^T / sqrt(K) + causal) v,  query head h reads key/value head h // (H / Hk)

Implementations: "fused" is cuDNN's flash attention (NVIDIA GPU, bf16); "plain" is matmul, softmax, matmul, in float32.

Shapes: B batch, T new positions, L cache length, D width, H query heads, G key/value heads, K head size, R = H / G.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from smedjan_common.config import ModelConfig
from smedjan_common.errors import ConfigError
from smedjan_jax import sharding
from smedjan_jax.modules import Carried, Context, Linear, Params, State, apply_together


class Attention(nnx.Module):
    """The mixer `attention`: projections, RoPE, causal attention, output projection."""

    def __init__(self, config: ModelConfig, params: Params, name: str, implementation: str = "auto"):
        self.q_proj = Linear(params, f"{name}.q_proj")
        self.k_proj = Linear(params, f"{name}.k_proj")
        self.v_proj = Linear(params, f"{name}.v_proj")
        self.o_proj = Linear(params, f"{name}.o_proj")
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.implementation = implementation

    def __call__(self, x: jax.Array, context: Context, carried: Carried) -> tuple[jax.Array, Carried]:
        """Training: all positions at once."""
        return self.mix(self.project(x, context), context, carried)

    def project(self, x: jax.Array, context: Context) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, H, K], keys and values [B, T, G, K], not yet turned, of x [B, T, D]."""
        B, T, _ = x.shape
        query, key, value = apply_together([self.q_proj, self.k_proj, self.v_proj], x)
        heads, kv_heads = (B, T, self.heads, self.head_dim), (B, T, self.kv_heads, self.head_dim)
        return query.reshape(heads), key.reshape(kv_heads), value.reshape(kv_heads)

    def mix(self, projected: tuple[jax.Array, jax.Array, jax.Array], context: Context, carried: Carried) -> tuple[jax.Array, Carried]:
        """What `project` gave, mixed over the positions and projected back to [B, T, D]."""
        query, key, value = projected
        mixed = causal_attention(context.rope(query), context.rope(key), value, self.implementation, context.documents)
        return self._output(mixed), carried

    def step(self, x: jax.Array, context: Context, state: State, carried: Carried) -> tuple[jax.Array, State, Carried]:
        """Decoding: T new tokens after `context.position` earlier ones, whose keys and values are in the cache [B, G, L, K]."""
        rope, position = context.rope, context.position
        assert position is not None
        query, key, value = self.project(x, context)
        new = {"key": rope(key).swapaxes(1, 2), "value": value.swapaxes(1, 2)}
        state = {n: jax.lax.dynamic_update_slice_in_dim(state[n], new[n].astype(state[n].dtype), position, axis=2) for n in new}
        T, L = x.shape[1], state["key"].shape[2]
        seen_TL = jnp.arange(L)[None, :] <= position + jnp.arange(T)[:, None]
        mixed = masked_attention(rope(query), state["key"].swapaxes(1, 2), state["value"].swapaxes(1, 2), seen_TL)
        return self._output(mixed), state, carried

    def _output(self, out_BTHK: jax.Array) -> jax.Array:
        B, T, _, _ = out_BTHK.shape
        return self.o_proj(out_BTHK.reshape(B, T, self.heads * self.head_dim))


def causal_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, implementation: str = "auto", documents: jax.Array | None = None
) -> jax.Array:
    """Attention of every position to itself and the earlier ones of its document, [B, T, H, K]; key and value are [B, T, G, K].

    Raises ConfigError when "fused" is asked for where it cannot run; "auto" takes it wherever it can.
    """
    return sharding.over_heads(functools.partial(_attend, implementation), (query, key, value), documents)


def _attend(implementation: str, query: jax.Array, key: jax.Array, value: jax.Array, documents: jax.Array | None) -> jax.Array:
    obstacle = _fused_obstacle(query)
    if implementation == "fused" and obstacle:
        raise ConfigError("--attention fused cannot run here.", obstacle, "Take --attention auto or plain.")
    same_BTT = None if documents is None else documents[:, :, None] == documents[:, None, :]
    if implementation == "plain" or obstacle:
        seen_TT = jnp.tril(jnp.ones((query.shape[1], query.shape[1]), bool))
        return masked_attention(query, key, value, seen_TT if same_BTT is None else seen_TT & same_BTT)
    mask = None if same_BTT is None else same_BTT[:, None]
    return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=True, implementation="cudnn")


def masked_attention(query: jax.Array, key: jax.Array, value: jax.Array, seen: jax.Array) -> jax.Array:
    """The plain form: float32 scores and softmax over the positions that `seen`, [T, L] or [B, T, L], allows, [B, T, H, K]."""
    B, T, H, K = query.shape
    G = key.shape[2]
    q_BTGRK = query.reshape(B, T, G, H // G, K)
    scores = jnp.einsum("btgrk,blgk->bgrtl", q_BTGRK, key, preferred_element_type=jnp.float32) * K**-0.5
    seen = seen if seen.ndim == 2 else seen[:, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1).astype(query.dtype)
    return jnp.einsum("bgrtl,blgk->btgrk", weights, value).reshape(B, T, H, K)


def _fused_obstacle(query: jax.Array) -> str:
    """Why cuDNN's attention cannot take these arrays; empty when it can."""
    if jax.default_backend() != "gpu":
        return "cuDNN attention needs an NVIDIA GPU."
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return "cuDNN attention needs --dtype bfloat16."
    if query.shape[-1] % 8 or query.shape[-1] > 128:
        return "cuDNN attention needs a head size that is a multiple of 8, at most 128."
    return ""
