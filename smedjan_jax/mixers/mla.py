"""Multi-head latent attention with decoupled RoPE (DeepSeek-V2, 2024; V3, 2024).

    q = x Wq^T,  or  norm(x Wqa^T) Wqb^T;   [c; r] = x Wkva^T,  c = norm(c);   [k; v] = c Wkvb^T per head
    q = [q_n; q_r] per head;  q_r and r (one for all heads) turned by their positions
    o = softmax((n^2 q_n k^T + m^2 q_r r^T) / sqrt(N + P) + causal) v,   m: YaRN's attention factor, and so is n as a rule

Training expands the latent c into keys and values. Decoding keeps c and r only, R + P values a token for all heads, and absorbs Wkvb into
the query and the output: q_n . k = (Wk^T q_n) . c.

Shapes: B batch, T new positions, L cache length, D width, H heads, N features of a head without and P with position, V = N value
features, R latent.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from smedjan_common.config import ModelConfig
from smedjan_common.model.mixers.mla import kv_rank, rope_dim
from smedjan_common.model.rope import plain_factor, turning
from smedjan_jax.mixers.attention import causal_attention
from smedjan_jax.mixers.cache import extend
from smedjan_jax.modules import Carried, Context, Linear, Params, RMSNorm, State, apply_together, together


class LatentAttention(nnx.Module):
    """The mixer `mla`: compression, expansion, RoPE on a part of each head, causal attention, output projection."""

    def __init__(self, config: ModelConfig, params: Params, name: str, implementation: str = "auto"):
        if config.mla_q_rank:
            self.q_a_proj = Linear(params, f"{name}.q_a_proj")
            self.q_a_norm = RMSNorm(params, f"{name}.q_a_norm", config.norm_eps)
            self.q_b_proj = Linear(params, f"{name}.q_b_proj")
        else:
            self.q_proj = Linear(params, f"{name}.q_proj")
        self.kv_a_proj = Linear(params, f"{name}.kv_a_proj")
        self.kv_a_norm = RMSNorm(params, f"{name}.kv_a_norm", config.norm_eps)
        self.kv_b_proj = Linear(params, f"{name}.kv_b_proj")
        self.o_proj = Linear(params, f"{name}.o_proj")
        self.heads, self.head_dim, self.rope_dim, self.rank = config.heads, config.head_dim, rope_dim(config), kv_rank(config)
        self.low_rank_query = bool(config.mla_q_rank)
        self.reads = self.together = ("q_a_proj" if config.mla_q_rank else "q_proj", "kv_a_proj")
        self.factor, self.turning = plain_factor(config), turning(config, rope_dim(config))
        self.implementation = implementation

    def __call__(self, x: jax.Array, context: Context, carried: Carried) -> tuple[jax.Array, Carried]:
        """Training: all positions at once."""
        return self.mix(self.project(x, context), context, carried)

    def project(self, x: jax.Array, context: Context) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, H, N + P], keys beside values [B, T, H, N + V], keys with position [B, T, 1, P], none turned, of x [B, T, D]."""
        B, T, _ = x.shape
        query, latent, key = self._compress(x)
        return query, self.kv_b_proj(latent).reshape(B, T, self.heads, 2 * self.head_dim), key

    def mix(self, projected: tuple[jax.Array, jax.Array, jax.Array], context: Context, carried: Carried) -> tuple[jax.Array, Carried]:
        """What `project` gave, mixed over the positions and projected back to [B, T, D]."""
        query, key_value, turning_key = projected
        plain_key, value = jnp.split(key_value, 2, axis=-1)
        turned_key = jnp.broadcast_to(context.rope(turning_key, self.turning), (*plain_key.shape[:3], self.rope_dim))
        query, key = jnp.concatenate([*self._turn(query, context)], axis=-1), jnp.concatenate([plain_key, turned_key], axis=-1)
        # attention takes values as wide as keys
        value = jnp.pad(value, [(0, 0), (0, 0), (0, 0), (0, self.rope_dim)])
        mixed = causal_attention(query, key, value, self.implementation, context.documents)[..., : self.head_dim]
        return self._output(mixed), carried

    def step(self, x: jax.Array, context: Context, state: State, carried: Carried) -> tuple[jax.Array, State, Carried]:
        """Decoding: T new tokens after `context.position` earlier ones, whose latents [B, L, R] and turned keys [B, L, P] are kept."""
        query, latent, key = self._compress(x)
        read, seen_BTS, state = extend(state, {"latent": latent, "key": context.rope(key, self.turning)[:, :, 0]}, context, axis=1)
        key_HNR, value_HVR = jnp.split(self.kv_b_proj.weight.astype(x.dtype).reshape(self.heads, -1, self.rank), 2, axis=1)
        plain_q, turned_q = self._turn(query, context)
        absorbed_BTHR = jnp.einsum("bthn,hnr->bthr", plain_q, key_HNR)
        scores = jnp.einsum("bthr,bsr->bhts", absorbed_BTHR, read["latent"], preferred_element_type=jnp.float32)
        scores += jnp.einsum("bthp,bsp->bhts", turned_q, read["key"], preferred_element_type=jnp.float32)
        scores = jnp.where(seen_BTS[:, None], scores * (self.head_dim + self.rope_dim) ** -0.5, -jnp.inf)
        mixed_BTHR = jnp.einsum("bhts,bsr->bthr", jax.nn.softmax(scores, axis=-1).astype(x.dtype), read["latent"])
        return self._output(jnp.einsum("bthr,hvr->bthv", mixed_BTHR, value_HVR)), state, carried

    def _compress(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, H, N + P], latents [B, T, R] and keys with position [B, T, 1, P], not yet turned."""
        B, T, _ = x.shape
        query, compressed = apply_together(together(self), x)
        if self.low_rank_query:
            query = self.q_b_proj(self.q_a_norm(query))
        latent, key = jnp.split(compressed, [self.rank], axis=-1)
        return query.reshape(B, T, self.heads, -1), self.kv_a_norm(latent), key[:, :, None]

    def _turn(self, query: jax.Array, context: Context) -> tuple[jax.Array, jax.Array]:
        """The parts of the queries without position, times n^2, and with it, times m, as the turned keys are."""
        plain, turned = jnp.split(query, [self.head_dim], axis=-1)
        return plain if self.factor == 1.0 else plain * self.factor**2, context.rope(turned, self.turning)

    def _output(self, out_BTHV: jax.Array) -> jax.Array:
        B, T, _, _ = out_BTHV.shape
        return self.o_proj(out_BTHV.reshape(B, T, self.heads * self.head_dim))
