"""The menus: one row per sequence mixer (MIXERS) and per feed-forward (FFNS).

A row tells everything that is not array work: parameters, cost, decode state, what is impossible, where the float64
definition lives and how closely both backends meet it. Counting, initial values, `sizes`, the conformance suite and the
benchmarks walk these tables; a new row with its reference and its two classes is all that a new mixer takes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from smedjan_common.errors import ConfigError

if TYPE_CHECKING:
    from smedjan_common.config import ModelConfig
    from smedjan_common.params import ParamSpec


@dataclass(frozen=True)
class StateSpec:
    """One array of a decode state: its name, shape, and dtype ("compute" = the run's compute dtype)."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "compute"


@dataclass(frozen=True)
class Tolerance:
    """Gates of the conformance suite in float32 (NUMERICS.md): relative differences."""

    forward: float = 1e-5
    gradient: float = 1e-5


@dataclass(frozen=True)
class MixerSpec:
    """A sequence mixer.

    parameters(config, layer) -> its tensors, names relative to `layers.{i}.mixer.`.
    flops(config, seq_len) -> forward FLOPs per token beyond 2 * parameters, a causal pair counted once.
    state(config, batch, max_len) -> arrays of the decode state of one layer.
    validate(config) raises ConfigError.
    reference: module of the float64 definition. jax, mlx: class in smedjan_{jax,mlx}.mixers.
    """

    name: str
    about: str
    module: str
    class_name: str
    parameters: "Callable[[ModelConfig, int], list[ParamSpec]]"
    flops: "Callable[[ModelConfig, int], int]"
    state: "Callable[[ModelConfig, int, int], list[StateSpec]]"
    validate: "Callable[[ModelConfig], None]"
    tolerance: Tolerance = Tolerance()


@dataclass(frozen=True)
class FfnSpec:
    """A feed-forward: like MixerSpec, without a state. `active(config)`: parameters that one token meets."""

    name: str
    about: str
    module: str
    class_name: str
    parameters: "Callable[[ModelConfig, int], list[ParamSpec]]"
    active: "Callable[[ModelConfig], int]"
    validate: "Callable[[ModelConfig], None]"
    tolerance: Tolerance = Tolerance()


def _weight(name: str, out: int, into: int, axes: tuple[str, str], std: float) -> "ParamSpec":
    from smedjan_common.params import ParamSpec

    return ParamSpec(f"{name}.weight", (out, into), axes, "normal", std)


def residual_std(config: "ModelConfig") -> float:
    """Standard deviation of projections that write to the residual: init_std / sqrt(2 layers) (GPT-2, 2019)."""
    return config.init_std / (2 * config.layers) ** 0.5


# attention: softmax(q k^T / sqrt(K)) v with RoPE; MHA or GQA


def _attention_parameters(config: "ModelConfig", layer: int) -> "list[ParamSpec]":
    kv = config.kv_heads * config.head_dim
    return [
        _weight("q_proj", config.dim, config.dim, ("heads", "embed"), config.init_std),
        _weight("k_proj", kv, config.dim, ("kv_heads", "embed"), config.init_std),
        _weight("v_proj", kv, config.dim, ("kv_heads", "embed"), config.init_std),
        _weight("o_proj", config.dim, config.dim, ("embed", "heads"), residual_std(config)),
    ]


def _attention_flops(config: "ModelConfig", seq_len: int) -> int:
    return 2 * config.dim * seq_len  # q k^T and p v: 2 * 2 * dim * seq_len / 2, the causal half


def _attention_state(config: "ModelConfig", batch: int, max_len: int) -> list[StateSpec]:
    shape = (batch, config.kv_heads, max_len, config.head_dim)
    return [StateSpec("key", shape), StateSpec("value", shape)]


def _attention_validate(config: "ModelConfig") -> None:
    if config.heads % config.kv_heads:
        fits = [h for h in range(1, config.heads + 1) if config.heads % h == 0]
        raise ConfigError(
            f"--heads {config.heads} does not divide into --kv-heads {config.kv_heads} groups.",
            "Every key/value head serves the same number of query heads.",
            f"Take --kv-heads {min(fits, key=lambda h: abs(h - config.kv_heads))}.",
        )
    if config.head_dim % 2:
        raise ConfigError(
            f"A head has {config.head_dim} features, an odd number.", "RoPE turns pairs of features.", "Choose --dim / --heads even."
        )


MIXERS: dict[str, MixerSpec] = {
    row.name: row
    for row in (
        MixerSpec(
            "attention",
            "softmax attention with RoPE, multi-head or grouped-query",
            "attention",
            "Attention",
            _attention_parameters,
            _attention_flops,
            _attention_state,
            _attention_validate,
        ),
    )
}


# swiglu: down(silu(gate(x)) * up(x))


def _swiglu_parameters(config: "ModelConfig", layer: int) -> "list[ParamSpec]":
    return [
        _weight("gate_proj", config.ffn_dim, config.dim, ("ffn", "embed"), config.init_std),
        _weight("up_proj", config.ffn_dim, config.dim, ("ffn", "embed"), config.init_std),
        _weight("down_proj", config.dim, config.ffn_dim, ("embed", "ffn"), residual_std(config)),
    ]


FFNS: dict[str, FfnSpec] = {
    row.name: row
    for row in (
        FfnSpec(
            "swiglu",
            "gated linear unit with SiLU (Shazeer, 2020)",
            "ffn",
            "SwiGLU",
            _swiglu_parameters,
            lambda config: 3 * config.dim * config.ffn_dim,
            lambda config: None,
        ),
    )
}
