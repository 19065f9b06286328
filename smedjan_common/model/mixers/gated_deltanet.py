"""The row of `gated-deltanet`: the gated delta rule in the form of Qwen3-Next, --heads value heads over --kv-heads key heads.

Decay rates start at A ~ U(0.01, 16), time steps log-uniform in [0.001, 0.1], as in Mamba-2; neither decays.
"""

from dataclasses import dataclass

from smedjan_common.model.activations import Activations, Course, Measured
from smedjan_common.model.mixers.shared import Chunked, Convolved, check_kv_heads
from smedjan_common.model.parameter import ParamSpec, residual_std, weight
from smedjan_common.model.spec import MixerSpec, StateSpec


@dataclass(frozen=True)
class Options(Convolved):
    """Options of `gated-deltanet`."""


def _parameters(config: Options, layer: int) -> list[ParamSpec]:
    keys, std = config.kv_heads * config.head_dim, config.init_std
    return [
        weight("q_proj", keys, config.dim, ("kv_heads", "embed"), std),
        weight("k_proj", keys, config.dim, ("kv_heads", "embed"), std),
        weight("v_proj", config.dim, config.dim, ("heads", "embed"), std),
        weight("z_proj", config.dim, config.dim, ("heads", "embed"), std),
        weight("a_proj", config.heads, config.dim, ("heads", "embed"), std),
        weight("b_proj", config.heads, config.dim, ("heads", "embed"), std),
        ParamSpec("conv.weight", (_convolved(config), config.conv_width), (None, None), "uniform", config.conv_width**-0.5),
        ParamSpec("A_log", (config.heads,), ("heads",), "log_of_uniform", (0.01, 16.0), decay=False),
        ParamSpec("dt_bias", (config.heads,), ("heads",), "time_step", (1e-3, 1e-1, 1e-4), decay=False),
        ParamSpec("norm.weight", (config.head_dim,), (None,), "ones", 1.0, decay=False),
        weight("o_proj", config.dim, config.dim, ("embed", "heads"), residual_std(config)),
    ]


def _convolved(config: Options) -> int:
    """Features of q, k and v together."""
    return (2 * config.kv_heads + config.heads) * config.head_dim


def _flops(config: Options, seq_len: int) -> int:
    return 6 * config.dim * config.head_dim  # S k, the product with k and S q: 2 per entry of S [V, K] each


def _state(config: Options, batch: int, max_len: int) -> list[StateSpec]:
    return [
        StateSpec("window", (batch, config.conv_width - 1, _convolved(config))),
        StateSpec("S", (batch, config.heads, config.head_dim, config.head_dim), "float32"),
    ]


def _validate(config: Options) -> None:
    check_kv_heads(config, "Every key head of gated-deltanet serves the same number of value heads.")


MEASURED: Measured = {
    "gpu": Activations(1, 0.63, 0.44, 0.62),
    "kernels": Activations(0.48, 0.44, 0.44, 0.62),
    "cpu": Activations(1.8, 0.5, 0.18, 0.21),
    "cpu-0.10": Activations(2.3, 2.3, 2.3, 0.1),
    "mlx": Activations(1.2, 0.34, 0.091, 1.9),
}


def _activations(config: Options, course: Course) -> Activations:
    keys, chunk = config.kv_heads * config.head_dim, course.chunk_size
    features = 10.4 * config.dim + 7.2 * keys + 5.6 * config.dim * config.head_dim / chunk + 1.2 * config.heads * chunk
    return MEASURED[course.form].times(features)


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
)
