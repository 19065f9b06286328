"""Linear attention with a decay per head: simple GLA (Yang et al., 2024), RetNet (Sun et al., 2023), or no decay.

    S_t = e^{g_t} S_{t-1} + k_t v_t^T,  o_t = S_t^T phi(q_t) / sqrt(K),  k = phi(x Wk^T)
    y = (rms_norm(o) * silu(gate)) Wo^T,  or o / (phi(q) . z + eps) in place of the norm, z the same sum of the keys alone

The choices stand in smedjan_common/model/mixers/linear.py. Query head h reads key/value head h // (H / G), which has the decay.

Shapes: B batch, T positions, D width, H query heads, G key/value heads, K head size.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from smedjan_common.config import ModelConfig
from smedjan_common.model.mixers.linear import DECAY_DIVISOR, DENOMINATOR_EPS, fixed_log_decay
from smedjan_jax.kernels import SHORTEST, around
from smedjan_jax.mixers.decay import scalar_decay
from smedjan_jax.modules import Carried, Context, Linear, Params, RMSNorm, State, apply_together, together
from smedjan_jax.products import copies
from smedjan_jax.sharding import over_tensor

Arrays = tuple[jax.Array, ...]


class LinearAttention(nnx.Module):
    """The mixer `linear`: projections, decayed sums, norm, gate, output projection."""

    def __init__(self, config: ModelConfig, params: Params, name: str, implementation: str = "auto"):
        self.q_proj = Linear(params, f"{name}.q_proj")
        self.k_proj = Linear(params, f"{name}.k_proj")
        self.v_proj = Linear(params, f"{name}.v_proj")
        self.gate_proj = Linear(params, f"{name}.gate_proj")
        if config.linear_decay == "scalar":
            self.decay_proj = Linear(params, f"{name}.decay_proj")
            self.decay_bias = nnx.data(params[f"{name}.decay_bias"])
        if config.linear_normalizer == "rmsnorm":
            self.norm = RMSNorm(params, f"{name}.norm", config.norm_eps)
        self.o_proj = Linear(params, f"{name}.o_proj")
        learned = ("decay_proj",) if config.linear_decay == "scalar" else ()
        self.reads = self.together = ("q_proj", "k_proj", "v_proj", "gate_proj", *learned)
        self.config, self.implementation = config, implementation

    def __call__(self, x: jax.Array, context: Context, carried: Carried) -> tuple[jax.Array, Carried]:
        """Training: all positions at once."""
        return self.mix(self.project(x, context), context, carried)

    def project(self, x: jax.Array, context: Context) -> Arrays:
        """q [B, T, D], k and v [B, T, G K], the gate [B, T, D] and, where it is learned, what makes the decay [B, T, G], of x [B, T, D]."""
        if not around(self.implementation, context.position):
            return tuple(apply_together(together(self), x))
        # a matmul each: of one matmul the kernels would get copies
        of_gate, of_query, of_key, of_value, *of_decay = copies(x, len(self.together))
        scaled, weight = self._scales_weight(context), self.q_proj.weight
        query = of_query @ (weight * self.config.head_dim**-0.5).astype(x.dtype).T if scaled else self.q_proj(of_query)
        decay = [self.decay_proj(each) for each in of_decay]
        return query, self.k_proj(of_key), self.v_proj(of_value), self.gate_proj(of_gate), *decay

    def mix(self, projected: Arrays, context: Context, carried: Carried) -> tuple[jax.Array, Carried]:
        """What `project` gave, mixed over the positions and projected back to [B, T, D]."""
        return self._mixed(projected, context, None)[0], carried

    def step(self, x: jax.Array, context: Context, state: State, carried: Carried) -> tuple[jax.Array, State, Carried]:
        """Decoding: T new tokens after those whose sums are in the state [B, G, K, K], a column for the keys' sum added if it divides."""
        y, after = self._mixed(self.project(x, context), context, state["state"])
        return y, {"state": after}, carried

    def _mixed(self, projected: Arrays, context: Context, state: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        query, key, value, gate = projected[:4]
        (B, T, D), G, K = query.shape, self.config.kv_heads, self.config.head_dim
        if not self._scales_weight(context):
            query = (self._feature(query) * K**-0.5).astype(value.dtype)
        query = query.reshape(B, T, G, -1, K)
        key, value = self._feature(key).astype(value.dtype).reshape(B, T, G, K), value.reshape(B, T, G, 1, K)
        if self.config.linear_normalizer == "denominator":
            value = jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)
        before = None if state is None else state[:, :, None]
        o, after = self._core((query, key, value, self._log_decay(projected)[..., None]), context, before)
        if around(self.implementation, context.position) and self.config.linear_normalizer == "rmsnorm":
            from smedjan_jax.kernels.rows import gated_norm

            heads = (B, T, -1, K)
            gated = gated_norm(o.astype(gate.dtype).reshape(heads), gate.reshape(heads), self.norm.weight, self.config.norm_eps)
            return self.o_proj(gated.reshape(B, T, D)), after[:, :, 0]
        o = o.astype(jnp.float32)
        o = self.norm(o) if self.config.linear_normalizer == "rmsnorm" else o[..., :K] / (o[..., K:] + DENOMINATOR_EPS)
        gated = o.reshape(B, T, D) * jax.nn.silu(gate.astype(jnp.float32))
        return self.o_proj(gated.astype(gate.dtype)), after[:, :, 0]

    def _core(self, arrays: Arrays, context: Context, before: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Outputs, float32 or in the compute dtype, and the state after them."""
        if self.implementation != "pallas" or (before is not None and arrays[0].shape[1] < SHORTEST):
            query, key, value, log_decay = arrays
            return scalar_decay(query, key, value, log_decay, context.chunk_size, before, context.documents)
        from smedjan_jax.kernels import scalar_decay as kernel

        heads = 2, 2, 2, 2, 1, None  # G
        return over_tensor(kernel.scalar_decay, (*arrays, before, context.documents), heads, (2, 1))

    def _scales_weight(self, context: Context) -> bool:
        """Whether K^-1/2 goes into the weight of the queries, which spares a pass over them."""
        plain = isinstance(self.q_proj.weight, jax.Array) and not self.q_proj.float8 and self.q_proj.lora_a is None
        if self.config.linear_feature_map != "identity" or not plain:
            return False
        return around(self.implementation, context.position)

    def _feature(self, z: jax.Array) -> jax.Array:
        """phi, in float32: elu(z) + 1 is positive."""
        z = z.astype(jnp.float32)
        return jnp.maximum(z, 0) + jnp.exp(jnp.minimum(z, 0)) if self.config.linear_feature_map == "elu1" else z

    def _log_decay(self, projected: Arrays) -> jax.Array:
        """g [B, T, G], float32, not positive."""
        if self.config.linear_decay == "scalar":
            return jax.nn.log_sigmoid(projected[4].astype(jnp.float32) + self.decay_bias) / DECAY_DIVISOR
        fixed = fixed_log_decay(self.config) if self.config.linear_decay == "fixed" else [0.0] * self.config.kv_heads
        return jnp.broadcast_to(jnp.asarray(fixed, jnp.float32), (*projected[0].shape[:2], self.config.kv_heads))
