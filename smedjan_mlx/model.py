"""The decoder in MLX: embedding, pre-norm blocks, final norm, tied head.

    x = E[tokens];  x = x + mixer(norm(x));  x = x + ffn(norm(x));  logits = norm(x) E^T

`Model(config, params)` wraps a flat dict of arrays (names of smedjan_common.params) into MLX modules. Building it moves
no data, so a step builds it anew inside its trace and differentiates with respect to the dict.

Shapes: B batch, T positions, D width, V padded vocabulary.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from smedjan_common.config import ModelConfig
from smedjan_common.mixers import MIXERS
from smedjan_mlx.ffn import ffn_class
from smedjan_mlx.mixers import mixer_class
from smedjan_mlx.modules import Block, Embedding, Params, RMSNorm, Rope

State = dict[str, Any]


class Model(nn.Module):
    """A decoder-only language model.

    params: float32 arrays by name. dtype: of activations and matmuls. attention: auto, fused or plain.
    gradient_checkpointing: none keeps all activations, dots keeps matmul outputs, full keeps block inputs.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        dtype: str = "float32",
        attention: str = "auto",
        gradient_checkpointing: str = "none",
    ):
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.gradient_checkpointing = gradient_checkpointing
        self.embed = Embedding(params, "embed")
        self.layers = [_block(config, params, layer, attention) for layer in range(config.layers)]
        self.norm = RMSNorm(params, "norm", config.norm_eps)

    def __call__(self, tokens: mx.array) -> mx.array:
        """Logits of the next token at every position of int tokens [B, T], float32 [B, T, V]."""
        return self.embed.logits(self.hidden(tokens))

    def hidden(self, tokens: mx.array) -> mx.array:
        """What the head reads, [B, T, D] in the compute dtype."""
        rope = Rope(self.config, tokens.shape[1])
        apply = CHECKPOINTED[self.gradient_checkpointing]
        x_BTD = self.embed(tokens, getattr(mx, self.dtype))
        for block in self.layers:
            x_BTD = apply(block, x_BTD, rope)
        return self.norm(x_BTD)

    def init_state(self, batch: int, max_len: int) -> State:
        """An empty decode state for `max_len` positions: {"position", "layers": [arrays by name, …]}."""
        layers = []
        for layer in range(self.config.layers):
            specs = MIXERS[self.config.mixer_of(layer)].state(self.config, batch, max_len)
            layers.append({s.name: mx.zeros(s.shape, getattr(mx, self.dtype if s.dtype == "compute" else s.dtype)) for s in specs})
        return {"position": mx.zeros((), mx.int32), "layers": layers}

    def step(self, tokens: mx.array, state: State, max_len: int) -> tuple[mx.array, State]:
        """Consume T >= 1 new tokens: logits after the last one, float32 [B, V], and the new state."""
        position, T = state["position"], tokens.shape[1]
        rope = Rope(self.config, max_len, position)
        x_BTD, layers = self.embed(tokens, getattr(mx, self.dtype)), []
        for block, layer_state in zip(self.layers, state["layers"], strict=True):
            x_BTD, layer_state = block.step(x_BTD, rope, layer_state, position)
            layers.append(layer_state)
        logits_BV = self.embed.logits(self.norm(x_BTD[:, -1:]))[:, 0]
        return logits_BV, {"position": position + T, "layers": layers}


def _block(config: ModelConfig, params: Params, layer: int, attention: str) -> Block:
    at = f"layers.{layer}"
    return Block(
        RMSNorm(params, f"{at}.mixer_norm", config.norm_eps),
        mixer_class(config.mixer_of(layer))(config, params, f"{at}.mixer", attention),
        RMSNorm(params, f"{at}.ffn_norm", config.norm_eps),
        ffn_class(config.ffn_of(layer))(config, params, f"{at}.ffn"),
    )


def _apply(block: Block, x_BTD: mx.array, rope: Rope) -> mx.array:
    return block(x_BTD, rope)


def _apply_dots(block: Block, x_BTD: mx.array, rope: Rope) -> mx.array:
    """Recompute norms, rotation, mixing and activation; keep what the matmuls gave.

    Each half is cut right after its input matmuls. MLX evaluates lazily: a matmul at the end of a recomputed piece is
    not run again, since its own output is not needed for its gradient.
    """
    for norm, module, extra in ((block.mixer_norm, block.mixer, (rope,)), (block.ffn_norm, block.ffn, ())):
        projected = _recomputed([norm, module], lambda x, norm=norm, module=module: module.project(norm(x)))(x_BTD)
        mixed = _recomputed([module], lambda *p, module=module, extra=extra: module.mix(p, *extra))(*projected)
        x_BTD = x_BTD + mixed
    return x_BTD


def _apply_full(block: Block, x_BTD: mx.array, rope: Rope) -> mx.array:
    return _recomputed([block], lambda x: block(x, rope))(x_BTD)


def _recomputed(modules: list[nn.Module], function: Callable) -> Callable:
    """`function` checkpointed: mx.checkpoint differentiates with respect to arguments only, so weights become arguments."""

    def with_weights(weights: list[dict], *args: mx.array) -> Any:
        for module, tensors in zip(modules, weights, strict=True):
            module.update(tensors)
        return function(*args)

    checkpointed = mx.checkpoint(with_weights)
    return lambda *args: checkpointed([module.parameters() for module in modules], *args)


CHECKPOINTED = {"none": _apply, "dots": _apply_dots, "full": _apply_full}
