"""What a row of the menus says: MixerSpec for a sequence mixer, FfnSpec for a feed-forward."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smedjan_common.model.config import ModelConfig
    from smedjan_common.model.parameter import ParamSpec


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

    module, class_name: its class in smedjan_{jax,mlx}.mixers; the module of the float64 definition has the same name.
    parameters(config, layer) -> its tensors, names relative to `layers.{i}.mixer.`.
    flops(config, seq_len) -> forward FLOPs per token beyond 2 * parameters, a causal pair counted once.
    state(config, batch, max_len) -> arrays of the decode state of one layer.
    validate(config) raises ConfigError.
    options: fields of ModelConfig that it reads besides dim, heads and kv_heads. training: of TrainConfig, that other rows do not read.
    rope: turns by position. documents: can keep documents apart. linear: its cost per token does not grow with the length.
    small: ModelConfig options for the conformance suite's model (width 32, 4 heads, 17 tokens). variants: more of them, by name.
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
    options: tuple[str, ...] = ()
    training: tuple[str, ...] = ()
    rope: bool = True
    documents: bool = True
    linear: bool = False
    small: Mapping[str, Any] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class FfnSpec:
    """A feed-forward: like MixerSpec, without a state.

    active(config): parameters that one token meets. copies(config): how many copies of a token go their own ways.
    """

    name: str
    about: str
    module: str
    class_name: str
    parameters: "Callable[[ModelConfig, int], list[ParamSpec]]"
    active: "Callable[[ModelConfig], int]"
    validate: "Callable[[ModelConfig], None]"
    tolerance: Tolerance = Tolerance()
    options: tuple[str, ...] = ()
    copies: "Callable[[ModelConfig], int]" = lambda config: 0
    small: Mapping[str, Any] = field(default_factory=dict)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
