"""The row of `linear`: linear attention with a scalar decay per head (simple GLA), or a fixed one (RetNet), or none.

--linear-decay scalar: g = logsigmoid(w x + b) / 16; fixed: g = log(1 - 2^(-5-h)); none: g = 0.
"""

import math
from dataclasses import dataclass
from typing import Literal

from smedjan_common.errors import ConfigError
from smedjan_common.model.activations import Activations, Course, Measured
from smedjan_common.model.mixers.shared import Chunked, check_kv_heads
from smedjan_common.model.options import option
from smedjan_common.model.parameter import ParamSpec, residual_std, weight
from smedjan_common.model.shape import Shape
from smedjan_common.model.spec import MixerSpec, StateSpec

DECAY_DIVISOR = 16.0  # of the logarithm of the learned decay: at the start a head forgets over some 23 tokens (GLA, 2024)
DENOMINATOR_EPS = 1e-6  # Katharopoulos et al., 2020


@dataclass(frozen=True)
class Options(Shape):
    """Options of `linear`."""

    linear_decay: Literal["none", "fixed", "scalar"] = option(
        "scalar", "how the state decays. scalar: by a gate on the token, one per head; fixed: RetNet's rates."
    )
    linear_feature_map: Literal["identity", "elu1"] = option("identity", "what is done to queries and keys.")
    linear_normalizer: Literal["rmsnorm", "denominator"] = option(
        "rmsnorm", "how the output is normalised; denominator needs --linear-feature-map elu1."
    )


def fixed_log_decay(config: Options) -> list[float]:
    """RetNet's log decay of each key/value head: log(1 - 2^(-5-h))."""
    return [math.log1p(-(2.0 ** (-5 - head))) for head in range(config.kv_heads)]


def value_dim(config: Options) -> int:
    """Features of a value in the state: with the denominator a one follows, whose sum is the sum of the keys."""
    return config.head_dim + (config.linear_normalizer == "denominator")


def _parameters(config: Options, layer: int) -> list[ParamSpec]:
    kv = config.kv_heads * config.head_dim
    specs = [
        weight("q_proj", config.dim, config.dim, ("heads", "embed"), config.init_std),
        weight("k_proj", kv, config.dim, ("kv_heads", "embed"), config.init_std),
        weight("v_proj", kv, config.dim, ("kv_heads", "embed"), config.init_std),
        weight("gate_proj", config.dim, config.dim, ("heads", "embed"), config.init_std),
    ]
    if config.linear_decay == "scalar":
        specs.append(weight("decay_proj", config.kv_heads, config.dim, ("kv_heads", "embed"), config.init_std))
        specs.append(ParamSpec("decay_bias", (config.kv_heads,), ("kv_heads",), "constant", 0.0, decay=False))
    if config.linear_normalizer == "rmsnorm":
        specs.append(ParamSpec("norm.weight", (config.head_dim,), (None,), "ones", 1.0, decay=False))
    specs.append(weight("o_proj", config.dim, config.dim, ("embed", "heads"), residual_std(config)))
    return specs


def _flops(config: Options, seq_len: int) -> int:
    # the recurrence itself, whatever the chunks: k v^T into every state, q S for every query head, and q z for its denominator
    denominators = config.heads * (config.linear_normalizer == "denominator")
    return 2 * config.head_dim * (config.head_dim * (config.kv_heads + config.heads) + denominators)


def _state(config: Options, batch: int, max_len: int) -> list[StateSpec]:
    return [StateSpec("state", (batch, config.kv_heads, config.head_dim, value_dim(config)), "float32")]


def _validate(config: Options) -> None:
    check_kv_heads(config, "Every key/value head of linear keeps a state that the same number of query heads read.")
    if config.linear_normalizer == "denominator" and config.linear_feature_map == "identity":
        raise ConfigError(
            "--linear-normalizer denominator needs positive features.",
            "It divides by a sum of q k, which can be zero where features have both signs.",
            "Add --linear-feature-map elu1, or take --linear-normalizer rmsnorm.",
        )


MEASURED: Measured = {
    "gpu": Activations(1.1, 0.56, 0, 0.75),
    "kernels": Activations(0.82, 0.56, 0, 0.75),
    "cpu": Activations(2.3, 0.065, 0, 0.33),
    "cpu-0.10": Activations(3.2, 3.2, 3.2, 0.3),
    "mlx": Activations(2.1, 0.45, 0.47, 2.3),
}


def _activations(config: Options, course: Course) -> Activations:
    chunk = course.chunk_size
    states, pairs = config.dim * config.head_dim / chunk, config.heads * chunk
    features = 1.32 * (3 * config.dim + 2 * config.kv_heads * config.head_dim) + 1.5 * states + pairs
    return MEASURED[course.form].times(features)


ROW = MixerSpec(
    "linear",
    Options,
    "linear attention with a decay per head (simple GLA, RetNet), cost per token and state independent of the length",
    "linear",
    "LinearAttention",
    _parameters,
    _flops,
    _activations,
    _state,
    _validate,
    training=Chunked,
    linear=True,
)
