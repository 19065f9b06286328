"""Rotary position embedding (Su et al., 2021) with NTK-aware and YaRN (Peng et al., 2023) scaling: closed forms.

    theta_i = base^(-2i/K), i < K/2                     plain
    base' = base * s^(K/(K-2))                          NTK-aware
    theta' = theta (1 - ramp) + (theta / s) ramp        YaRN; cos and sin times m = 0.1 ln s + 1, or rope_attention_factor
    theta' = theta / s                                  linear (position interpolation; Chen et al., 2023)
    theta' = theta (1 - r) + (theta / s) r              llama3: r = 1 where a period is over L / low, 0 where it is under L / high, and
                                                        between (high - L / period) / (high - low) (Llama 3.1, 2024)
    theta'_i = theta_i / f_i                            longrope: f is one list in sequences of up to L positions, another in longer ones;
                                                        m = sqrt(1 + ln s / ln L) (Ding et al., 2024; Phi-3)

K: features that turn (a whole head; a part of it in `mla`), s: factor, L: original context. Half-split layout (Llama): feature i
turns with feature i + K/2.
How long a sequence of longrope is counts for all of its positions, so it is settled before the first (`settled`): by the length of the row
in training and scoring, and in decoding by how many positions the state can hold.

Computed once in float64; both backends and the reference start from these numbers.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from smedjan_common.model.config import ModelConfig
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.mixers.mla import Options as MlaOptions
from smedjan_common.model.shape import Shape

BETA_FAST, BETA_SLOW = 32.0, 1.0


class Turning(NamedTuple):
    """What tells how a layer turns from how another of the same model does: K, the base, and the scaling."""

    dim: int
    base: float
    scaling: str


def turning(config: Shape, dim: int) -> Turning:
    """Of the model as a layer sees it."""
    return Turning(dim, config.rope_base, config.rope_scaling)


def settled(config: ModelConfig, longest: int) -> ModelConfig:
    """The model of sequences of up to `longest` positions: both lists of longrope are the one that holds for these."""
    if config.rope_scaling != "longrope":
        return config
    factors = config.rope_long_factors if longest > original_length(config) else config.rope_short_factors
    return dataclasses.replace(config, rope_short_factors=factors, rope_long_factors=factors)


def turnings(config: ModelConfig) -> dict[Turning, ModelConfig]:
    """Every one of the model, rising, each with the model as one of its layers sees it."""
    layers = [(MIXERS[config.mixer_of(layer)].rope_dims, config.at(layer)) for layer in range(config.layers)]
    found = {turning(layer, dim): layer for dims, layer in layers if dims for dim in dims(layer)}
    return dict(sorted(found.items(), key=lambda item: item[0]))


def frequencies(config: Shape, dim: int | None = None) -> np.ndarray:
    """Angle per position, float64 [K/2]; K is `dim`, or the head size when that is None."""
    return _SCALINGS[config.rope_scaling](config, dim or config.head_dim)


def periods(config: Shape, dim: int | None = None) -> np.ndarray:
    """1 / frequencies, positions per radian, float32 [K/2]."""
    return (1.0 / frequencies(config, dim)).astype(np.float32)


def attention_factor(config: Shape) -> float:
    """m: multiplies cos and sin, so attention scores grow by m^2; 1 but for YaRN and longrope."""
    if config.rope_scaling not in ("yarn", "longrope"):
        return 1.0
    return config.rope_attention_factor or usual_attention_factor(config)


def usual_attention_factor(config: Shape) -> float:
    """The same where the model does not say another one."""
    if config.rope_scaling == "longrope":
        return math.sqrt(1.0 + math.log(config.rope_factor) / math.log(original_length(config)))
    return 0.1 * math.log(config.rope_factor) + 1.0


def plain_factor(config: MlaOptions) -> float:
    """The same of features that `mla` does not turn: its square multiplies their scores."""
    return config.mla_plain_factor or attention_factor(config)


def tables(config: Shape, length: int, dim: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of positions 0..length-1, float32 [length, K/2], times the attention factor.

    Angles are float32 products, as everywhere in the field, and rounded just as mx.fast.rope rounds them: it takes periods.
    """
    angles = np.arange(length, dtype=np.float32)[:, None] * (np.float32(1) / periods(config, dim))[None, :]
    angles, m = angles.astype(np.float64), attention_factor(config)
    return (np.cos(angles) * m).astype(np.float32), (np.sin(angles) * m).astype(np.float32)


def original_length(config: Shape) -> int:
    """L: the context that the model was trained at before it was extended."""
    return config.rope_original_len or max(1, round(config.context_length / config.rope_factor))


def ntk_base(config: Shape, dim: int) -> float:
    """The base that stretches positions as NTK-aware scaling of K = `dim` does."""
    return config.rope_base * config.rope_factor ** (dim / (dim - 2) if dim > 2 else 1.0)


def _plain(config: Shape, dim: int, base: float | None = None) -> np.ndarray:
    return (base or config.rope_base) ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)


def _ntk(config: Shape, dim: int) -> np.ndarray:
    return _plain(config, dim, ntk_base(config, dim))


def _yarn(config: Shape, dim: int) -> np.ndarray:
    length = original_length(config)

    def dimension(rotations: float) -> float:
        return dim * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_base))

    low = max(math.floor(dimension(BETA_FAST)), 0)
    high = min(math.ceil(dimension(BETA_SLOW)), dim - 1)
    ramp = np.clip((np.arange(dim // 2, dtype=np.float64) - low) / max(high - low, 0.001), 0, 1)
    theta = _plain(config, dim)
    return theta * (1 - ramp) + theta / config.rope_factor * ramp


def _linear(config: Shape, dim: int) -> np.ndarray:
    return _plain(config, dim) / config.rope_factor


def _llama3(config: Shape, dim: int) -> np.ndarray:
    theta, low, high = _plain(config, dim), config.rope_low_freq_factor, config.rope_high_freq_factor
    turns = original_length(config) * theta / (2 * math.pi)  # over the original context
    ramp = np.clip((high - turns) / (high - low), 0, 1)
    return theta * (1 - ramp) + theta / config.rope_factor * ramp


def _longrope(config: Shape, dim: int) -> np.ndarray:
    return _plain(config, dim) / np.array(config.rope_short_factors)


_SCALINGS = {"none": _plain, "ntk": _ntk, "yarn": _yarn, "linear": _linear, "llama3": _llama3, "longrope": _longrope}
