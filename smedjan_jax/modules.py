"""The parts of the decoder in Flax NNX: linear map, RMSNorm, rotary embedding, block.

A module takes its tensors out of the flat parameter dict by name and is a JAX pytree, so plain JAX transforms apply.
Master weights are float32; they are cast to the dtype of the activations where they are used.

Shapes: B batch, T positions, L positions of a table, D width, H heads, K head size, F = K/2 rotary pairs, V vocabulary.
"""

import functools
import itertools
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from smedjan_common.config import ModelConfig
from smedjan_common.model import rope as rope_tables
from smedjan_common.model.adapters import LORA_A, LORA_B
from smedjan_common.model.rope import Turning
from smedjan_common.training.memory import loss_chunks
from smedjan_jax import products, sharding
from smedjan_jax.quantized import Quantized, weight_of

Params = dict[str, jax.Array]
State = dict[str, jax.Array]  # decode state of one layer, by the names of its row
Carried = dict[str, jax.Array]  # what a layer leaves for later layers or for the loss


class Linear(nnx.Module):
    """y = x W^T, and a bias and an adapter where there are; all are used in the dtype of the activations only. W is [out, in]."""

    def __init__(self, params: Params, name: str):
        self.weight = nnx.data(weight_of(params, f"{name}.weight"))
        self.bias = nnx.data(params.get(f"{name}.bias"))
        self.lora_a: Any = nnx.data(params.get(f"{name}.{LORA_A}"))
        self.lora_b: Any = nnx.data(params.get(f"{name}.{LORA_B}"))
        self.float8 = ""  # one of float8.FORMS where it is multiplied in it

    def __call__(self, x: jax.Array) -> jax.Array:
        return self._completed(products.linear(x, [self.weight], self.float8), *_lowered([self], x))

    def _completed(self, y: jax.Array, low: jax.Array | None) -> jax.Array:
        """y with the bias, and what the adapter makes of low = x A^T (smedjan_jax.adapters has scaled B), where there are."""
        y = y if self.bias is None else y + self.bias.astype(y.dtype)
        return y if low is None else y + low @ self.lora_b.astype(y.dtype).T


def _lowered(linears: list[Linear], x: jax.Array) -> list[jax.Array | None]:
    """x A^T for each linear map that has an adapter, by one matmul: x is wide, and what comes out is narrow."""
    adapted = [linear for linear in linears if linear.lora_a is not None]
    if not adapted:
        return [None] * len(linears)
    low = x @ jnp.concatenate([linear.lora_a for linear in adapted]).astype(x.dtype).T
    parts = iter(jnp.split(low, len(adapted), axis=-1))
    return [None if linear.lora_a is None else next(parts) for linear in linears]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Part:
    """A weight that is the outputs `start` to `stop` of a larger one, which a decoder keeps instead (smedjan_jax.weights)."""

    whole: jax.Array
    start: int = field(metadata={"static": True})
    stop: int = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.whole.shape[:-2], self.stop - self.start, self.whole.shape[-1])

    def astype(self, dtype: Any) -> jax.Array:
        return self.whole[..., self.start : self.stop, :].astype(dtype)


def together(module: Any) -> list[Linear]:
    """The linear maps that a module names `together`: all of the same x."""
    return [getattr(module, name) for name in module.together]


def apart(linears: list[Linear]) -> bool:
    """Whether a decoder keeps these weights one by one: to join them for every token would cost more than one matmul saves."""
    first, last = linears[0].weight, linears[-1].weight
    quantized = any(isinstance(linear.weight, Quantized) for linear in linears)
    return quantized or (isinstance(first, Part) and isinstance(last, Part) and first.whole is not last.whole)


def joined(linears: list[Linear]) -> jax.Array:
    """The weights of these linear maps as one, outputs after outputs."""
    first = linears[0].weight
    return first.whole if isinstance(first, Part) else jnp.concatenate([products.whole(linear.weight) for linear in linears], axis=-2)


def apply_together(linears: list[Linear], x: jax.Array) -> list[jax.Array]:
    """What each linear map gives for the same x, by one matmul: on an H100 it is 2 % of a step faster (bench/results)."""
    if sharding.tensor_parts() > 1 or apart(linears):  # one matmul would mix the devices' parts of each
        return [linear(x) for linear in linears]
    found, low = {}, dict(zip(map(id, linears), _lowered(linears, x), strict=True))
    for float8 in dict.fromkeys(linear.float8 for linear in linears):
        those = [linear for linear in linears if linear.float8 == float8]
        first = those[0].weight
        y = products.linear(x, [first.whole] if isinstance(first, Part) else [linear.weight for linear in those], float8)
        bounds = itertools.accumulate(linear.weight.shape[0] for linear in those[:-1])
        parts = zip(those, jnp.split(y, list(bounds), axis=-1), strict=True)
        found |= {id(linear): linear._completed(part, low[id(linear)]) for linear, part in parts}
    return [found[id(linear)] for linear in linears]


def gated(x: jax.Array, gate: jax.Array | None = None) -> jax.Array:
    """sigmoid(gate) * x in the dtype of x, the sigmoid in float32; x where there is no gate."""
    return x if gate is None else x * jax.nn.sigmoid(gate.astype(jnp.float32)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps), in float32, cast back, times the weight (Zhang & Sennrich, 2019)."""

    def __init__(self, params: Params, name: str, eps: float):
        self.weight = nnx.data(params[f"{name}.weight"])
        self.eps = eps
        self.folded = False  # Block.fold

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * self.weight.astype(x.dtype)


class Embedding(nnx.Module):
    """Rows of a table [V, D]; the same table, or another, is the output head."""

    def __init__(self, params: Params, name: str):
        self.weight = nnx.data(weight_of(params, f"{name}.weight"))

    def __call__(self, tokens: jax.Array, dtype: Any, deterministic: bool = False) -> jax.Array:
        """[B, T] -> [B, T, D]. `deterministic`: the gradient is a matrix product, since a GPU adds up equal tokens in any order."""
        if deterministic:
            return _look_up(self.weight, tokens, dtype)
        # cast after the look-up: the gradient is then summed over repeated tokens in float32
        return self.weight[tokens].astype(dtype)

    def logits(self, x: jax.Array) -> jax.Array:
        """Scores of every token, accumulated and returned in float32 [B, T, V]."""
        return jnp.matmul(x, self.weight.astype(x.dtype).T, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _look_up(weight_VD: jax.Array, tokens: jax.Array, dtype: Any) -> jax.Array:
    return weight_VD[tokens].astype(dtype)


def _looked_up(weight_VD: jax.Array, tokens: jax.Array, dtype: Any):
    return _look_up(weight_VD, tokens, dtype), (tokens.reshape(-1), weight_VD.shape[0])


def _row_sums(dtype: Any, residuals, cotangent: jax.Array):
    """One-hot tokens times the gradients, in chunks of tokens: each product with 1 is exact, the sum is in float32."""
    tokens_N, vocab = residuals
    chunks = loss_chunks(tokens_N.size, vocab)
    missing = -tokens_N.size % chunks
    tokens = jnp.pad(tokens_N, (0, missing), constant_values=-1).reshape(chunks, -1)
    gradients = jnp.pad(cotangent.reshape(tokens_N.size, -1), ((0, missing), (0, 0))).reshape(chunks, -1, cotangent.shape[-1])

    def add(total_VD, chunk):
        hit_VC = jax.lax.broadcasted_iota(jnp.int32, (vocab, chunk[0].size), 0) == chunk[0]
        return total_VD + jnp.matmul(hit_VC.astype(dtype), chunk[1], preferred_element_type=jnp.float32), None

    return jax.lax.scan(add, jnp.zeros((vocab, cotangent.shape[-1]), jnp.float32), (tokens, gradients))[0], None


_look_up.defvjp(_looked_up, _row_sums)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What every block of one call is told.

    position: tokens before these ones in each row when decoding, int32 [B]; None in training. documents: int32 [B, T], positions with
    equal numbers are of one document, and numbers never fall along a row; None: one document. chunk_size: positions that mixers of
    linear cost take at once. active: bool [B], rows whose decode state changes; None: all. length: how many entries of a decode state
    by position are read, which hold all that the rows have seen; None: all.
    """

    rope: "Rope"
    position: jax.Array | None
    documents: jax.Array | None
    chunk_size: int = field(metadata={"static": True})
    active: jax.Array | None = None
    length: int | None = field(default=None, metadata={"static": True})


class Block(nnx.Module):
    """x + r mixer(norm(x)), then x + r ffn(norm(x)), r = residual; norms by name, those after a mixer
    or feed-forward too. Mixers and feed-forwards may add to `carried`, which blocks hand on."""

    def __init__(self, norms: dict[str, RMSNorm], mixer: Any, ffn: Any, residual: float = 1.0):
        self.mixer_norm, self.ffn_norm = norms.get("mixer_norm"), norms.get("ffn_norm")
        self.mixer_post_norm, self.ffn_post_norm = norms.get("mixer_post_norm"), norms.get("ffn_post_norm")
        self.mixer: Any = mixer
        self.ffn: Any = ffn
        self.residual = residual

    def fold(self) -> None:
        """Multiply the norms' weights into the matrices that read what they give, which then read the kernel's (kernels/norm.py).

        A mixer or feed-forward `reads` its input through the linear maps that it names so alone, between which and the input nothing
        mixes features; one that names none keeps its norm.
        """
        for norm, module in ((self.mixer_norm, self.mixer), (self.ffn_norm, self.ffn)):
            assert norm is not None, "there is nothing to fold"
            for linear in (getattr(module, name) for name in getattr(module, "reads", ())):
                linear.weight, norm.folded = nnx.data(linear.weight * norm.weight), True

    def __call__(self, x: jax.Array, context: Context, carried: Carried) -> tuple[jax.Array, Carried]:
        """Training: x [B, T, D] -> [B, T, D]."""
        x, read = self._read(self.mixer_norm, x)
        mixed, carried = self.mixer(read, context, carried)
        # the barriers keep XLA from fusing the residual into both neighbours and computing it twice, which costs memory traffic
        x = jax.lax.optimization_barrier(self.add(x, normed(self.mixer_post_norm, mixed)))
        x, read = self._read(self.ffn_norm, x)
        fed, carried = self.ffn(read, carried)
        return jax.lax.optimization_barrier(self.add(x, normed(self.ffn_post_norm, fed))), carried

    def _read(self, norm: RMSNorm | None, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x, to go on with, and what a mixer or feed-forward reads of it."""
        if norm is None or not norm.folded:
            return x, normed(norm, x)
        from smedjan_jax.kernels.norm import normalized

        return normalized(x, norm.eps)

    def step(self, x: jax.Array, context: Context, state: State, carried: Carried) -> tuple[jax.Array, State, Carried]:
        """The same for T new tokens of each row, which follow its `context.position` earlier ones."""
        mixed, state, carried = self.mixer.step(normed(self.mixer_norm, x), context, state, carried)
        x = self.add(x, normed(self.mixer_post_norm, mixed))
        fed, carried = self.ffn(normed(self.ffn_norm, x), carried)
        return self.add(x, normed(self.ffn_post_norm, fed)), state, carried

    def add(self, x: jax.Array, more: jax.Array) -> jax.Array:
        """The residual stream with what a mixer or feed-forward adds."""
        return x + more if self.residual == 1 else x + self.residual * more


def normed(norm: RMSNorm | None, x: jax.Array) -> jax.Array:
    """x normalised, where there is a norm."""
    return x if norm is None else norm(x)


class Rope(nnx.Module):
    """Rotary position embedding of `length` positions from 0 on, or from each row's of `position` [B] on, wherever those stand.

    cos and sin, by turning, are [L, F], in float64 until they are rounded; of given positions [B, L, F], of float32 angles as well.
    """

    def __init__(self, config: ModelConfig, length: int, position: jax.Array | None = None):
        tables, at_BL = {}, None if position is None else (position[:, None] + jnp.arange(length)).astype(jnp.float32)
        for turning, layer in rope_tables.turnings(config).items():
            if at_BL is None:
                tables[turning] = tuple(map(jnp.asarray, rope_tables.tables(layer, length, turning.dim)))
            else:
                angle_BLF = at_BL[..., None] * (np.float32(1) / rope_tables.periods(layer, turning.dim))
                m = rope_tables.attention_factor(layer)
                tables[turning] = jnp.cos(angle_BLF) * m, jnp.sin(angle_BLF) * m
        self.cos = nnx.data({turning: cos for turning, (cos, _) in tables.items()})
        self.sin = nnx.data({turning: sin for turning, (_, sin) in tables.items()})

    def __call__(self, x: jax.Array, turning: Turning) -> jax.Array:
        """Turn feature i of x [B, T, H, K] with feature i + K/2: (a, b) -> (a cos - b sin, b cos + a sin). K: all or the first features."""
        K = turning.dim
        if x.shape[-1] > K:
            return jnp.concatenate([self(x[..., :K], turning), x[..., K:]], axis=-1)
        B, T, H, _ = x.shape
        pairs = x.astype(jnp.float32).reshape(B, T, H, 2, K // 2)
        cos_TF, sin_TF = self.cos[turning], self.sin[turning]
        signed_sin = jnp.stack([-sin_TF, sin_TF], axis=-2)[..., None, :, :]
        # XLA fuses a reversal of the pair axis into the product, a concatenation of halves it writes out
        turned = pairs * cos_TF[..., None, None, :] + jax.lax.rev(pairs, (3,)) * signed_sin
        return turned.reshape(B, T, H, K).astype(x.dtype)
