"""Options that several mixers share, and the check of shared keys and values."""

from dataclasses import dataclass
from typing import Literal

from smedjan_common.errors import ConfigError, nearest_divisor
from smedjan_common.model.options import option
from smedjan_common.model.shape import SWITCH, Shape


@dataclass(frozen=True)
class HeadNorm(Shape):
    """Of a model."""

    qk_norm: bool = option(False, "RMSNorm over the queries and keys, each head by itself (Qwen3).")
    qk_norm_over: Literal["head", "all"] = option("head", "what --qk-norm is over: each head, or all of them together (OLMo 2).")
    qkv_bias: bool = option(False, "biases of the query, key and value projections (Qwen2).")
    o_bias: bool = option(False, "a bias of the output projection.")
    attention_gate: bool = option(False, "a sigmoid gate on each feature of what heads give, before the output projection (Qwen3-Next).")
    attention_multiplier: float = option(
        0.0, "what scores of attention are multiplied by.", least=0, most=1e6, filled="1 over the root of the head size", shape_free=True
    )
    rope_dim: int = option(
        0, "features of a head that turn by position, the first ones (Phi-4-mini).", least=0, filled="whole heads", shape_free=True
    )
    rope_layers: tuple[str, ...] = option(
        ("on",), "whether a layer turns by position, a pattern over the depth (on,on,on,off: SmolLM3).", choices=SWITCH, shape_free=True
    )


@dataclass(frozen=True)
class Convolved(Shape):
    """Of a model."""

    conv_width: int = option(4, "width of the causal convolution.", least=1)


@dataclass(frozen=True)
class Softmax:
    """Of the training."""

    attention: Literal["auto", "fused", "plain"] = option(
        "auto", "Implementation of attention. fused fails where there is none; auto takes the best there is."
    )


@dataclass(frozen=True)
class Chunked:
    """Of the training."""

    chunk_size: int = option(64, "Positions that mixers of linear cost take at once: a matter of speed, the result is the same.", least=1)
    kernels: Literal["auto", "pallas", "plain"] = option(
        "auto",
        "Implementation (JAX). pallas, this project's kernels, fails where they cannot run; plain: matrix products; auto takes what was"
        " measured faster, and the first line of a run says which.",
    )


def check_kv_heads(config: Shape, why: str) -> None:
    """Raises ConfigError, with the reason `why`, for query heads that the key/value heads do not divide."""
    if config.heads % config.kv_heads:
        raise ConfigError(
            f"--heads {config.heads} does not divide into --kv-heads {config.kv_heads} groups.",
            why,
            f"Take --kv-heads {nearest_divisor(config.heads, config.kv_heads)}.",
        )


def check_no_kv_heads(config: Shape, name: str, why: str, fix: str) -> None:
    """Raises ConfigError for --kv-heads in a model whose only mixer has no key/value heads."""
    if config.kv_heads != config.heads and set(config.mixer) == {name}:
        raise ConfigError(f"--kv-heads {config.kv_heads} would do nothing.", why, fix)
