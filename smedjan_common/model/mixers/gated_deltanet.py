"""The row of `gated-deltanet`: the gated delta rule in the form of Qwen3-Next, --heads value heads over --kv-heads key heads, or as many
of any size as its own options say.

Decay rates start at A ~ U(0.01, 16), time steps log-uniform in [0.001, 0.1], as in Mamba-2; neither decays.
"""

from dataclasses import dataclass
from typing import NamedTuple

from smedjan_common.errors import ConfigError, nearest_divisor
from smedjan_common.model.activations import Activations, Course, Measured
from smedjan_common.model.mixers.shared import Chunked, Convolved, check_kv_heads
from smedjan_common.model.options import option
from smedjan_common.model.parameter import ParamSpec, residual_std, weight
from smedjan_common.model.spec import MixerSpec, StateSpec


@dataclass(frozen=True)
class Options(Convolved):
    """Options of `gated-deltanet`."""

    delta_key_heads: int = option(0, "key heads.", least=0, filled="--kv-heads")
    delta_value_heads: int = option(0, "value heads.", least=0, filled="--heads")
    delta_key_size: int = option(0, "features of a key head.", least=0, filled="those of a head of the model")
    delta_value_size: int = option(0, "features of a value head.", least=0, filled="those of a head of the model")

    @property
    def delta_key_dim(self) -> int:
        """Features of a key head, K."""
        return self.delta_key_size or self.head_dim

    @property
    def delta_value_dim(self) -> int:
        """Features of a value head, V."""
        return self.delta_value_size or self.head_dim


class Heads(NamedTuple):
    """G key heads of K features, H value heads of V features."""

    keys: int
    values: int
    key_dim: int
    value_dim: int

    @property
    def key_features(self) -> int:
        """Of all key heads, G K."""
        return self.keys * self.key_dim

    @property
    def value_features(self) -> int:
        """Of all value heads, H V."""
        return self.values * self.value_dim

    @property
    def convolved(self) -> int:
        """Features of q, k and v together, F."""
        return 2 * self.key_features + self.value_features


def heads(config: Options) -> Heads:
    """The heads of the model's layers: its own, where options say so."""
    keys, values = config.delta_key_heads or config.kv_heads, config.delta_value_heads or config.heads
    return Heads(keys, values, config.delta_key_dim, config.delta_value_dim)


def _parameters(config: Options, layer: int) -> list[ParamSpec]:
    own, dim, std = heads(config), config.dim, config.init_std
    return [
        weight("q_proj", own.key_features, dim, ("kv_heads", "embed"), std),
        weight("k_proj", own.key_features, dim, ("kv_heads", "embed"), std),
        weight("v_proj", own.value_features, dim, ("heads", "embed"), std),
        weight("z_proj", own.value_features, dim, ("heads", "embed"), std),
        weight("a_proj", own.values, dim, ("heads", "embed"), std),
        weight("b_proj", own.values, dim, ("heads", "embed"), std),
        ParamSpec("conv.weight", (own.convolved, config.conv_width), (None, None), "uniform", config.conv_width**-0.5),
        ParamSpec("A_log", (own.values,), ("heads",), "log_of_uniform", (0.01, 16.0), decay=False),
        ParamSpec("dt_bias", (own.values,), ("heads",), "time_step", (1e-3, 1e-1, 1e-4), decay=False),
        ParamSpec("norm.weight", (own.value_dim,), (None,), "ones", 1.0, decay=False),
        weight("o_proj", dim, own.value_features, ("embed", "heads"), residual_std(config)),
    ]


def _flops(config: Options, seq_len: int) -> int:
    own = heads(config)
    return 6 * own.value_features * own.key_dim  # S k, the product with k and S q: 2 per entry of S [V, K] each


def _state(config: Options, batch: int, max_len: int) -> list[StateSpec]:
    own = heads(config)
    return [
        StateSpec("window", (batch, config.conv_width - 1, own.convolved)),
        StateSpec("S", (batch, own.values, own.value_dim, own.key_dim), "float32"),
    ]


def _validate(config: Options) -> None:
    why, own = "Every key head of gated-deltanet serves the same number of value heads.", heads(config)
    if not (config.delta_key_heads or config.delta_value_heads):
        check_kv_heads(config, why)
    elif own.values % own.keys:
        raise ConfigError(
            f"{own.values} value heads of gated-deltanet do not divide into {own.keys} groups.",
            why,
            f"Take --delta-key-heads {nearest_divisor(own.values, own.keys)}.",
        )


MEASURED: Measured = {
    "gpu": Activations(1, 0.63, 0.44, 0.62),
    "kernels": Activations(0.48, 0.44, 0.44, 0.62),
    "cpu": Activations(1.8, 0.5, 0.18, 0.21),
    "cpu-0.10": Activations(2.3, 2.3, 2.3, 0.1),
    "mlx": Activations(1.2, 0.34, 0.091, 1.9),
}


def _activations(config: Options, course: Course) -> Activations:
    own, chunk = heads(config), course.chunk_size
    values = own.value_features
    features = 10.4 * values + 7.2 * own.key_features + 5.6 * values * own.key_dim / chunk + 1.2 * own.values * chunk
    return MEASURED[course.form].times(features + config.dim - values)  # measured where both are the same


ROW = MixerSpec(
    "gated-deltanet",
    Options,
    "gated delta rule with a scalar decay (Qwen3-Next), cost per token and state independent of the length",
    "gated_deltanet",
    "GatedDeltaNet",
    _parameters,
    _flops,
    _activations,
    _state,
    _validate,
    training=Chunked,
    linear=True,
    head_size=True,
)
