"""The parts of the decoder in MLX: linear map, RMSNorm, rotary embedding, block.

A module takes its tensors out of the flat parameter dict by name. Master weights are float32; they are cast to the dtype
of the activations where they are used.

Shapes: B batch, T positions, L positions of a table, D width, H heads, K head size, F = K/2 rotary pairs, V vocabulary.
"""

import itertools
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from smedjan_common.config import ModelConfig
from smedjan_common.model import rope as rope_tables
from smedjan_common.model.adapters import LORA_A, LORA_B
from smedjan_common.model.rope import Turning
from smedjan_common.training.memory import loss_chunks
from smedjan_mlx.quantized import Quantized, product, weight_of

Params = dict[str, mx.array]
State = dict[str, mx.array]  # decode state of one layer, by the names of its row
Carried = dict[str, mx.array]  # what a layer leaves for later layers or for the loss


class Linear(nn.Module):
    """y = x W^T, and a bias and an adapter where there are; all are used in the dtype of the activations only. W is [out, in]."""

    def __init__(self, params: Params, name: str):
        super().__init__()
        self.weight = weight_of(params, f"{name}.weight")
        self.bias = params.get(f"{name}.bias")
        self.lora_a: Any = params.get(f"{name}.{LORA_A}")
        self.lora_b: Any = params.get(f"{name}.{LORA_B}")

    def __call__(self, x: mx.array) -> mx.array:
        return self._completed(product(x, self.weight), *_lowered([self], x))

    def _completed(self, y: mx.array, low: mx.array | None) -> mx.array:
        """y with the bias, and what the adapter makes of low = x A^T (smedjan_mlx.adapters has scaled B), where there are."""
        y = y if self.bias is None else y + self.bias.astype(y.dtype)
        return y if low is None else y + low @ self.lora_b.astype(y.dtype).T


def _lowered(linears: list[Linear], x: mx.array) -> list[mx.array | None]:
    """x A^T for each linear map that has an adapter, by one matmul: x is wide, and what comes out is narrow."""
    adapted = [linear for linear in linears if linear.lora_a is not None]
    if not adapted:
        return [None] * len(linears)
    low = x @ mx.concatenate([linear.lora_a for linear in adapted]).astype(x.dtype).T
    parts = iter(mx.split(low, len(adapted), axis=-1))
    return [None if linear.lora_a is None else next(parts) for linear in linears]


@dataclass(frozen=True)
class Part:
    """A weight that is the outputs `start` to `stop` of a larger one, which a decoder keeps instead (smedjan_mlx.weights)."""

    whole: mx.array
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.whole.shape[:-2], self.stop - self.start, self.whole.shape[-1])

    def astype(self, dtype: Any) -> mx.array:
        return self.whole[..., self.start : self.stop, :].astype(dtype)


def together(module: Any) -> list[Linear]:
    """The linear maps that a module names `together`: all of the same x."""
    return [getattr(module, name) for name in module.together]


def apart(linears: list[Linear]) -> bool:
    """Whether a decoder keeps these weights one by one: to join them for every token would cost more than one matmul saves."""
    first, last = linears[0].weight, linears[-1].weight
    quantized = any(isinstance(linear.weight, Quantized) for linear in linears)
    return quantized or (isinstance(first, Part) and isinstance(last, Part) and first.whole is not last.whole)


def joined(linears: list[Linear]) -> mx.array:
    """The weights of these linear maps as one, outputs after outputs."""
    first = linears[0].weight
    return first.whole if isinstance(first, Part) else mx.concatenate([linear.weight for linear in linears], axis=-2)


def apply_together(linears: list[Linear], x: mx.array) -> list[mx.array]:
    """What each linear map gives for the same x, by one matmul: on an H100 it is 2 % of a step faster (bench/results)."""
    if apart(linears):
        return [linear(x) for linear in linears]
    y, bounds = x @ joined(linears).astype(x.dtype).T, list(itertools.accumulate(linear.weight.shape[0] for linear in linears[:-1]))
    parts = zip(linears, mx.split(y, bounds, axis=-1), _lowered(linears, x), strict=True)
    return [linear._completed(part, low) for linear, part, low in parts]


def gated(x: mx.array, gate: mx.array | None = None) -> mx.array:
    """sigmoid(gate) * x in the dtype of x, the sigmoid in float32; x where there is no gate."""
    return x if gate is None else x * mx.sigmoid(gate.astype(mx.float32)).astype(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps), in float32, cast back, times the weight (Zhang & Sennrich, 2019)."""

    def __init__(self, params: Params, name: str, eps: float):
        super().__init__()
        self.weight = params[f"{name}.weight"]
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        # the weight goes in: its gradient, a sum over all positions, is then the kernel's, 9 % of a step on an H200 (bench/results)
        return mx.fast.rms_norm(x, self.weight.astype(x.dtype), self.eps)


class Embedding(nn.Module):
    """Rows of a table [V, D]; the same table, or another, is the output head."""

    def __init__(self, params: Params, name: str):
        super().__init__()
        self.weight = weight_of(params, f"{name}.weight")

    def __call__(self, tokens: mx.array, dtype: Any, deterministic: bool = False) -> mx.array:
        """[B, T] -> [B, T, D]. `deterministic`: the gradient is a matrix product, since a GPU adds up equal tokens in any order."""
        if deterministic:
            return cast(mx.array, _look_up(self.weight, tokens)).astype(dtype)
        # cast after the look-up: the gradient is then summed over repeated tokens in float32
        return self.weight[tokens].astype(dtype)

    def logits(self, x: mx.array) -> mx.array:
        """Scores of every token [B, T, V], returned in float32; of bfloat16 x they are rounded to that, as MLX's products are."""
        return product(x, self.weight).astype(mx.float32)


@mx.custom_function
def _look_up(weight_VD: mx.array, tokens: mx.array) -> mx.array:
    return weight_VD[tokens]


@_look_up.vjp
def _row_sums(primals, cotangent, output):
    """One-hot tokens times the gradients, in chunks of tokens: each product with 1 is exact, the sum is in float32."""
    weight_VD, tokens = primals
    vocab, tokens_N = weight_VD.shape[0], tokens.reshape(-1)
    gradients_ND = cotangent.reshape(tokens_N.size, -1)
    size = -(-tokens_N.size // loss_chunks(tokens_N.size, vocab))
    total_VD = mx.zeros_like(weight_VD)
    for start in range(0, tokens_N.size, size):
        hit_VC = mx.arange(vocab)[:, None] == tokens_N[start : start + size]
        total_VD = total_VD + hit_VC.astype(gradients_ND.dtype) @ gradients_ND[start : start + size]
    return total_VD, mx.zeros_like(tokens)


@dataclass(frozen=True)
class Context:
    """What every block of one call is told.

    position: tokens before these ones in each row when decoding, int32 [B]; None in training. documents: int32 [B, T], positions with
    equal numbers are of one document, and numbers never fall along a row; None: one document. chunk_size: positions that mixers of
    linear cost take at once. active: bool [B], rows whose decode state changes; None: all. length: how many entries of a decode state
    by position are read, which hold all that the rows have seen; None: all.
    """

    rope: "Rope"
    position: mx.array | None
    documents: mx.array | None
    chunk_size: int
    active: mx.array | None = None
    length: int | None = None


class Block(nn.Module):
    """x + r mixer(norm(x)), then x + r ffn(norm(x)), r = residual; norms by name, those after a mixer
    or feed-forward too. Mixers and feed-forwards may add to `carried`, which blocks hand on."""

    def __init__(self, norms: dict[str, RMSNorm], mixer: Any, ffn: Any, residual: float = 1.0):
        super().__init__()
        self.mixer_norm, self.ffn_norm = norms.get("mixer_norm"), norms.get("ffn_norm")
        self.mixer_post_norm, self.ffn_post_norm = norms.get("mixer_post_norm"), norms.get("ffn_post_norm")
        self.mixer: Any = mixer
        self.ffn: Any = ffn
        self.residual = residual

    def __call__(self, x: mx.array, context: Context, carried: Carried) -> tuple[mx.array, Carried]:
        """Training: x [B, T, D] -> [B, T, D]."""
        mixed, carried = self.mixer(normed(self.mixer_norm, x), context, carried)
        x = self.add(x, normed(self.mixer_post_norm, mixed))
        fed, carried = self.ffn(normed(self.ffn_norm, x), carried)
        return self.add(x, normed(self.ffn_post_norm, fed)), carried

    def step(self, x: mx.array, context: Context, state: State, carried: Carried) -> tuple[mx.array, State, Carried]:
        """The same for T new tokens of each row, which follow its `context.position` earlier ones."""
        mixed, state, carried = self.mixer.step(normed(self.mixer_norm, x), context, state, carried)
        x = self.add(x, normed(self.mixer_post_norm, mixed))
        fed, carried = self.ffn(normed(self.ffn_norm, x), carried)
        return self.add(x, normed(self.ffn_post_norm, fed)), state, carried

    def add(self, x: mx.array, more: mx.array) -> mx.array:
        """The residual stream with what a mixer or feed-forward adds."""
        return x + more if self.residual == 1 else x + self.residual * more


def normed(norm: RMSNorm | None, x: mx.array) -> mx.array:
    """x normalised, where there is a norm."""
    return x if norm is None else norm(x)


class Rope(nn.Module):
    """Rotary position embedding of `length` positions from 0 on, or from each row's of `position` [B] on, wherever those stand."""

    def __init__(self, config: ModelConfig, length: int, position: mx.array | None = None):
        super().__init__()
        turnings = rope_tables.turnings(config)
        self._periods = {turning: mx.array(rope_tables.periods(layer, turning.dim)) for turning, layer in turnings.items()}
        self._factors = {turning: rope_tables.attention_factor(layer) for turning, layer in turnings.items()}
        self._position = 0 if position is None else position

    def __call__(self, x: mx.array, turning: Turning) -> mx.array:
        """Turn feature i of x [B, H, T, K] with feature i + K/2: (a, b) -> (a cos - b sin, b cos + a sin). K: all or the first features."""
        K, factor = turning.dim, self._factors[turning]
        if x.shape[-1] > K:
            return mx.concatenate([self(x[..., :K], turning), x[..., K:]], axis=-1)
        turned = mx.fast.rope(x, K, traditional=False, base=None, scale=1.0, offset=self._position, freqs=self._periods[turning])
        return turned if factor == 1.0 else turned * factor
