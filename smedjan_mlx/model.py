"""The decoder in MLX: embedding, pre-norm blocks, final norm, head.

    x = E[tokens];  x = x + mixer(norm(x));  x = x + ffn(norm(x));  logits = norm(x) E^T, or those of a head of its own

Multipliers of the embedding, of what is added and of the logits are 1 unless the model says otherwise.

`Model(config, params)` wraps a flat dict of arrays (names of smedjan_common.model.params) into MLX modules. Building it moves
no data, so a step builds it anew inside its trace and differentiates with respect to the dict.

Shapes: B batch, T positions, D width, V padded vocabulary.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from smedjan_common.config import ModelConfig
from smedjan_common.inference.chunks import positions_held
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.mixers.shared import Chunked
from smedjan_common.model.rope import settled
from smedjan_mlx.ffn import ffn_class
from smedjan_mlx.kernels import chosen
from smedjan_mlx.mixers import mixer_class
from smedjan_mlx.modules import Block, Carried, Context, Embedding, Params, RMSNorm, Rope, normed

State = dict[str, Any]


class Model(nn.Module):
    """A decoder-only language model.

    params: float32 arrays by name. dtype: of activations and matmuls. attention: auto, fused or plain. kernels: auto, pallas or plain.
    gradient_checkpointing: none keeps all activations, dots keeps matmul outputs, full keeps block inputs.
    chunk_size: positions that mixers of linear cost take at once. deterministic: gradients have the same bits every time on a GPU too.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        dtype: str = "float32",
        attention: str = "auto",
        gradient_checkpointing: str = "none",
        chunk_size: int = 64,
        deterministic: bool = False,
        kernels: str = "auto",
    ):
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.gradient_checkpointing = gradient_checkpointing
        self.chunk_size = chunk_size
        self.deterministic = deterministic
        if deterministic and attention == "auto":
            attention = "reproducible"
        self.embed = Embedding(params, "embed")
        self.layers = [_block(config, params, layer, attention, kernels, dtype) for layer in range(config.layers)]
        self.norm = RMSNorm(params, "norm", config.norm_eps)
        self.head = self.embed if config.tied_head else Embedding(params, "head")

    def __call__(self, tokens: mx.array) -> mx.array:
        """Logits of the next token at every position of int tokens [B, T], float32 [B, T, V]."""
        return self.head.logits(self.hidden(tokens))

    def hidden(self, tokens: mx.array, documents: mx.array | None = None) -> mx.array:
        """What the head reads, [B, T, D] in the compute dtype. documents: int32 [B, T], see Context; nothing crosses their borders."""
        return self.outputs(tokens, documents)[0]

    def outputs(self, tokens: mx.array, documents: mx.array | None = None) -> tuple[mx.array, Carried]:
        """What the head reads, and what the blocks left beside it (losses and loads of experts)."""
        context = Context(Rope(settled(self.config, tokens.shape[1]), tokens.shape[1]), None, documents, self.chunk_size)
        apply = CHECKPOINTED[self.gradient_checkpointing]
        x_BTD, carried = self._embedded(tokens, self.deterministic), {}
        for block in self.layers:
            x_BTD, carried = apply(block, x_BTD, context, carried)
        return self._read(x_BTD), carried

    def _embedded(self, tokens: mx.array, deterministic: bool = False) -> mx.array:
        """Where the residual stream begins, [B, T, D]."""
        x_BTD = self.embed(tokens, getattr(mx, self.dtype), deterministic)
        e = self.config.embedding_multiplier
        return x_BTD if e == 1 else x_BTD * e

    def _read(self, x_BTD: mx.array) -> mx.array:
        """What the head reads: dividing it divides the logits."""
        d = self.config.logits_divisor
        return self.norm(x_BTD) if d == 1 else self.norm(x_BTD) / d

    def init_state(self, batch: int, max_len: int) -> State:
        """An empty decode state of `batch` rows for `max_len` positions: {"position" [B], "layers": [arrays by name, …]}."""
        layers = []
        for layer in range(self.config.layers):
            specs = MIXERS[self.config.mixer_of(layer)].state(self.config, batch, max_len)
            layers.append({s.name: mx.zeros(s.shape, getattr(mx, self.dtype if s.dtype == "compute" else s.dtype)) for s in specs})
        return {"position": mx.zeros(batch, mx.int32), "layers": layers}

    def step(self, tokens: mx.array, state: State, active: mx.array | None = None, length: int | None = None) -> tuple[mx.array, State]:
        """Consume T >= 1 new tokens of each row: logits after the last one, float32 [B, V], and the new state. Arguments as of `look`."""
        x_BTD, state = self._consume(tokens, state, active, length)
        return self.head.logits(self._read(x_BTD[:, -1:]))[:, 0], state

    def look(self, tokens: mx.array, state: State, active: mx.array | None = None, length: int | None = None) -> tuple[mx.array, State]:
        """The same with the logits after each of them, float32 [B, T, V].

        active, length: as in Context. T is at most the positions that the state holds (smedjan_common.inference.chunks).
        """
        x_BTD, state = self._consume(tokens, state, active, length)
        return self.head.logits(self._read(x_BTD)), state

    def _consume(self, tokens: mx.array, state: State, active: mx.array | None, length: int | None) -> tuple[mx.array, State]:
        """Through all blocks, [B, T, D], and the new state."""
        position, T = state["position"], tokens.shape[1]
        config = settled(self.config, positions_held(self.config, state["layers"]))
        context = Context(Rope(config, T, position), position, None, self.chunk_size, active, length)
        x_BTD, layers, carried = self._embedded(tokens), [], {}
        for layer, (block, before) in enumerate(zip(self.layers, state["layers"], strict=True)):
            x_BTD, after, carried = block.step(x_BTD, context, before, carried)
            layers.append(self._where_active(active, layer, before, after))
        return x_BTD, {"position": position + (T if active is None else T * active.astype(mx.int32)), "layers": layers}

    def _where_active(self, active: mx.array | None, layer: int, before: State, after: State) -> State:
        """Arrays that sum up the positions change in active rows only; mixers see to those by position themselves."""
        if active is None:
            return after
        summed = {spec.name for spec in MIXERS[self.config.mixer_of(layer)].state(self.config, 1, 1) if spec.axis is None}
        rows = {name: active.reshape(-1, *[1] * (after[name].ndim - 1)) for name in summed}
        return {**after, **{name: mx.where(rows[name], after[name], before[name]) for name in summed}}


def _block(config: ModelConfig, params: Params, layer: int, attention: str, kernels: str, dtype: str) -> Block:
    at, row = f"layers.{layer}", MIXERS[config.mixer_of(layer)]
    implementation = attention
    if row.training is Chunked:
        implementation = chosen(row.name, kernels, config, dtype)
    return Block(
        {name: RMSNorm(params, f"{at}.{name}", config.norm_eps) for name in config.block_norms},
        mixer_class(row.name)(config.at(layer), params, f"{at}.mixer", implementation),
        ffn_class(config.ffn_of(layer))(config, params, f"{at}.ffn"),
        config.residual_multiplier,
    )


def _apply(block: Block, x_BTD: mx.array, context: Context, carried: Carried) -> tuple[mx.array, Carried]:
    return block(x_BTD, context, carried)


def _apply_dots(block: Block, x_BTD: mx.array, context: Context, carried: Carried) -> tuple[mx.array, Carried]:
    """Recompute norms, rotation, mixing and activation; keep what the matmuls gave.

    Each half is cut right after its input matmuls. MLX evaluates lazily: a matmul at the end of a recomputed piece is
    not run again, since its own output is not needed for its gradient.
    """
    projected = _recomputed([*_there(block.mixer_norm), block.mixer], lambda x: block.mixer.project(normed(block.mixer_norm, x), context))(
        x_BTD
    )
    mixed, carried = _recomputed([block.mixer], lambda p, c: block.mixer.mix(p, context, c))(projected, carried)
    x_BTD = block.add(x_BTD, normed(block.mixer_post_norm, mixed))
    projected = _recomputed([*_there(block.ffn_norm), block.ffn], lambda x: block.ffn.project(normed(block.ffn_norm, x)))(x_BTD)
    fed, carried = _recomputed([block.ffn], lambda p, c: block.ffn.mix(p, c))(projected, carried)
    return block.add(x_BTD, normed(block.ffn_post_norm, fed)), carried


def _apply_full(block: Block, x_BTD: mx.array, context: Context, carried: Carried) -> tuple[mx.array, Carried]:
    return _recomputed([block], lambda x, c: block(x, context, c))(x_BTD, carried)


def _there(norm: RMSNorm | None) -> list[nn.Module]:
    return [] if norm is None else [norm]


def _recomputed(modules: list[nn.Module], function: Callable) -> Callable:
    """`function` checkpointed: mx.checkpoint differentiates with respect to arguments only, so weights become arguments."""

    def with_weights(weights: list[dict], *args: Any) -> Any:
        for module, tensors in zip(modules, weights, strict=True):
            module.update(tensors)
        return function(*args)

    checkpointed = mx.checkpoint(with_weights)
    return lambda *args: checkpointed([module.parameters() for module in modules], *args)


CHECKPOINTED = {"none": _apply, "dots": _apply_dots, "full": _apply_full}
