"""The parts of the decoder in Flax NNX: linear map, RMSNorm, rotary embedding, block.

A module takes its tensors out of the flat parameter dict by name and is a JAX pytree, so plain JAX transforms apply.
Master weights are float32; they are cast to the dtype of the activations where they are used.

Shapes: B batch, T positions, D width, H query heads, K head size, F = K/2 rotary pairs.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Params = dict[str, jax.Array]


class Linear(nnx.Module):
    """y = x W^T without bias; W is [out, in]."""

    def __init__(self, params: Params, name: str):
        self.weight = nnx.data(params[f"{name}.weight"])

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.weight.astype(x.dtype).T


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps), in float32, cast back, times the weight (Zhang & Sennrich, 2019)."""

    def __init__(self, params: Params, name: str, eps: float):
        self.weight = nnx.data(params[f"{name}.weight"])
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * self.weight.astype(x.dtype)


class Embedding(nnx.Module):
    """Rows of a table [V, D]; the same table is the output head."""

    def __init__(self, params: Params, name: str):
        self.weight = nnx.data(params[f"{name}.weight"])

    def __call__(self, tokens_BT: jax.Array, dtype: Any) -> jax.Array:
        # cast after the look-up: the gradient is then summed over repeated tokens in float32
        return self.weight[tokens_BT].astype(dtype)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Scores of every token, accumulated and returned in float32 [B, T, V]."""
        return jnp.matmul(x_BTD, self.weight.astype(x_BTD.dtype).T, preferred_element_type=jnp.float32)


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, mixer_norm: RMSNorm, mixer: nnx.Module, ffn_norm: RMSNorm, ffn: nnx.Module):
        self.mixer_norm = mixer_norm
        self.mixer = mixer
        self.ffn_norm = ffn_norm
        self.ffn = ffn

    def __call__(self, x_BTD: jax.Array, rope: "Rope") -> jax.Array:
        # the barriers keep XLA from fusing the residual into both neighbours and computing it twice (PERFORMANCE.md)
        x_BTD = jax.lax.optimization_barrier(x_BTD + self.mixer(self.mixer_norm(x_BTD), rope))
        return jax.lax.optimization_barrier(x_BTD + self.ffn(self.ffn_norm(x_BTD)))

    def step(self, x_BTD: jax.Array, rope: "Rope", state: dict[str, jax.Array], position: jax.Array):
        """The same for T new tokens that follow `position` earlier ones; returns (x, state)."""
        mixed, state = self.mixer.step(self.mixer_norm(x_BTD), rope, state, position)
        x_BTD = x_BTD + mixed
        return x_BTD + self.ffn(self.ffn_norm(x_BTD)), state


class Rope(nnx.Module):
    """cos and sin of the positions at hand, float32 [T, F], scaled by the attention factor."""

    def __init__(self, cos_TF: jax.Array, sin_TF: jax.Array):
        self.cos = nnx.data(cos_TF)
        self.sin = nnx.data(sin_TF)

    def __call__(self, x_BTHK: jax.Array) -> jax.Array:
        """Turn feature i with feature i + K/2: (a, b) -> (a cos - b sin, b cos + a sin)."""
        B, T, H, K = x_BTHK.shape
        pairs = x_BTHK.astype(jnp.float32).reshape(B, T, H, 2, K // 2)
        cos = self.cos[:, None, None, :]
        sin = jnp.stack([-self.sin, self.sin], axis=1)[:, None]
        # reversing the pair axis is a copy that fuses; concatenating halves is not (PERFORMANCE.md)
        turned = pairs * cos + jax.lax.rev(pairs, (3,)) * sin
        return turned.reshape(B, T, H, K).astype(x_BTHK.dtype)

    def at(self, position: jax.Array, length: int) -> "Rope":
        """The `length` positions from `position` on."""
        return Rope(*(jax.lax.dynamic_slice_in_dim(table, position, length) for table in (self.cos, self.sin)))
