"""The row of `ssm`: Mamba-2, a state space model with one decay per head (Dao & Gu, 2024).

Initial values are the paper's: decay rates A ~ U(1, 16), time steps log-uniform in [0.001, 0.1]; neither they nor the skip decay.
"""

from dataclasses import dataclass

from smedjan_common.errors import ConfigError, nearest_divisor
from smedjan_common.model.activations import Activations, Course, Measured
from smedjan_common.model.mixers.shared import Chunked, Convolved, check_no_kv_heads
from smedjan_common.model.options import option
from smedjan_common.model.parameter import ParamSpec, residual_std, weight
from smedjan_common.model.spec import MixerSpec, StateSpec


@dataclass(frozen=True)
class Options(Convolved):
    """Options of `ssm`."""

    ssm_state: int = option(128, "state size, N.", least=1)
    ssm_head_dim: int = option(64, "head size, P.", least=1)
    ssm_expand: int = option(2, "inner width over --dim.", least=1)
    ssm_groups: int = option(1, "groups of heads that share B and C.", least=1)


def inner_dim(config: Options) -> int:
    """Features of all heads together, E."""
    return config.ssm_expand * config.dim


def heads(config: Options) -> int:
    """Heads, H: --heads is attention's."""
    return inner_dim(config) // config.ssm_head_dim


def convolved_dim(config: Options) -> int:
    """Features that are convolved: x, B and C."""
    return inner_dim(config) + 2 * config.ssm_groups * config.ssm_state


def _parameters(config: Options, layer: int) -> list[ParamSpec]:
    inner, convolved, count = inner_dim(config), convolved_dim(config), heads(config)
    taps = config.conv_width**-0.5
    return [
        weight("in_proj", inner + convolved + count, config.dim, (None, "embed"), config.init_std),  # z, (x, B, C), dt
        ParamSpec("conv.weight", (convolved, config.conv_width), (None, None), "uniform", taps),
        ParamSpec("conv_bias", (convolved,), (None,), "uniform", taps, decay=False),
        ParamSpec("A_log", (count,), ("heads",), "log_of_uniform", (1.0, 16.0), decay=False),
        ParamSpec("dt_bias", (count,), ("heads",), "time_step", (1e-3, 1e-1, 1e-4), decay=False),
        ParamSpec("D", (count,), ("heads",), "ones", 1.0, decay=False),
        ParamSpec("norm.weight", (inner,), ("heads",), "ones", 1.0, decay=False),
        weight("out_proj", config.dim, inner, ("embed", "heads"), residual_std(config)),
    ]


def _flops(config: Options, seq_len: int) -> int:
    return 4 * inner_dim(config) * config.ssm_state  # the recurrence itself, whatever the chunks: B x^T into the state, and C S


def _state(config: Options, batch: int, max_len: int) -> list[StateSpec]:
    return [
        StateSpec("state", (batch, heads(config), config.ssm_state, config.ssm_head_dim), "float32"),
        StateSpec("window", (batch, config.conv_width - 1, convolved_dim(config))),
    ]


def _validate(config: Options) -> None:
    inner = inner_dim(config)
    if inner % config.ssm_head_dim:
        raise ConfigError(
            f"--ssm-expand {config.ssm_expand} x --dim {config.dim} does not divide into heads of --ssm-head-dim {config.ssm_head_dim}.",
            "Every head gets the same number of features.",
            f"Take --ssm-head-dim {nearest_divisor(inner, config.ssm_head_dim)}.",
        )
    if heads(config) % config.ssm_groups:
        raise ConfigError(
            f"{heads(config)} heads do not divide into --ssm-groups {config.ssm_groups}.",
            "Every group's B and C serve the same number of heads (--ssm-expand x --dim / --ssm-head-dim).",
            f"Take --ssm-groups {nearest_divisor(heads(config), config.ssm_groups)}.",
        )
    why = "ssm has no key/value heads; its B and C are shared by groups."
    check_no_kv_heads(config, "ssm", why, f"Leave --kv-heads out, or take --ssm-groups {config.kv_heads}.")


MEASURED: Measured = {
    "gpu": Activations(1, 0, 0.069, 1.8),
    "kernels": Activations(0.72, 0, 0.069, 1.8),
    "cpu": Activations(2, 0.5, 0, 0.26),
    "cpu-0.10": Activations(3.2, 3.2, 3.2, 0.1),
    "mlx": Activations(2.3, 0.35, 0.61, 1.9),
}


def _activations(config: Options, course: Course) -> Activations:
    inner, chunk = inner_dim(config), course.chunk_size
    states, pairs = inner * config.ssm_state / chunk, heads(config) * (chunk + config.ssm_state)
    return MEASURED[course.form].times(5.8 * inner + 0.67 * states + 1.33 * pairs)


ROW = MixerSpec(
    "ssm",
    Options,
    "Mamba-2 state space model, cost per token and state independent of the length",
    "ssm",
    "Mamba2",
    _parameters,
    _flops,
    _activations,
    _state,
    _validate,
    training=Chunked,
    linear=True,
)
