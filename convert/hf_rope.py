"""The rotary embedding in a config.json, either generation's keys.

Written so that transformers 5 (`rope_parameters`), transformers 4 and mlx-lm (`rope_theta`, `rope_scaling`) read the same model:
    none   rope_type default
    ntk    rope_type default with the base that NTK-aware scaling comes to, base * s^(K/(K-2)): nobody has a static NTK-aware form
    linear, llama3, longrope   by their names, longrope of phi3 alone
    yarn   rope_type yarn with factor, original_max_position_embeddings, beta_fast 32, beta_slow 1. The attention factor is left to
           the formula that all readers share, 0.1 ln s + 1; llama.cpp before 2026 would apply one that is written down twice.
           Latent attention has mscale and mscale_all_dim as well: all scores are multiplied by the square of 0.1 mscale_all_dim ln s + 1,
           and cosines and sines by 0.1 mscale ln s + 1 over that.
"""

import math
from typing import Any

from convert.hf_values import inexpressible, integer, number, shortest
from smedjan_common.config import ModelConfig
from smedjan_common.errors import CheckpointError
from smedjan_common.model import rope
from smedjan_common.model.json_fields import MAX_POSITION

LATENT = ("deepseek_v2", "deepseek_v3")  # architectures with latent attention


def rope_to_hf(config: ModelConfig) -> tuple[float, dict[str, Any] | None]:
    """(base, scaling) of the rotary embedding: the scaling is None where a base says it all."""
    if config.rope_scaling == "yarn":
        return config.rope_base, {
            "rope_type": "yarn",
            "factor": config.rope_factor,
            "original_max_position_embeddings": rope.original_length(config),
            "beta_fast": rope.BETA_FAST,
            "beta_slow": rope.BETA_SLOW,
            **(_factors_of_latents(config) if "mla" in config.mixer else {}),
        }
    if config.rope_scaling == "longrope":
        said = {"attention_factor": config.rope_attention_factor} if config.rope_attention_factor else {}
        return config.rope_base, {
            "type": "longrope",
            "rope_type": "longrope",
            "factor": config.rope_factor,
            "original_max_position_embeddings": rope.original_length(config),
            "short_factor": list(config.rope_short_factors),
            "long_factor": list(config.rope_long_factors),
            **said,
        }
    if config.rope_scaling == "linear":
        return config.rope_base, {"rope_type": "linear", "factor": config.rope_factor}
    if config.rope_scaling == "llama3":
        return config.rope_base, {
            "rope_type": "llama3",
            "factor": config.rope_factor,
            "low_freq_factor": config.rope_low_freq_factor,
            "high_freq_factor": config.rope_high_freq_factor,
            "original_max_position_embeddings": rope.original_length(config),
        }
    if config.rope_scaling == "ntk":
        return rope.ntk_base(config, turned_dim(config)), None
    return config.rope_base, None


def turned_dim(config: ModelConfig) -> int:
    """Features of a head that turn."""
    return config.rope_dim or config.head_dim


def rope_from_hf(values: dict[str, Any], where: str, context: int, head_dim: int, kind: str) -> dict[str, Any]:
    """The rope fields of a ModelConfig from either generation's keys. kind: the model_type, some of which read keys that others do not."""
    scaling = _object(values.get("rope_scaling") or values.get("rope_parameters") or {}, where)
    return {**_stretching(values, scaling, where, context, kind), **_part(values, scaling, where, head_dim)}


def rope_by_layer(values: dict[str, Any], where: str, context: int, layer_types: list[str], narrow_base: float) -> dict[str, Any]:
    """The same of an architecture whose layers with a window turn in another way than those that see all (OLMo 3), from `narrow_base` where
    config.json does not say."""
    kinds = ("full_attention", "sliding_attention")
    nested = _object(values.get("rope_parameters") or {}, where)
    if nested and not nested.keys() & set(kinds):
        raise inexpressible(where, "rope_parameters that are not of its layer_types", f"Those are {' and '.join(kinds)}")
    wide, narrow = (_object(nested.get(kind) or {}, where) for kind in kinds)
    wide = {**wide, **_object(values.get("rope_scaling") or {}, where)}
    narrow = {"rope_theta": narrow_base, **narrow}
    found, local = (_stretching(values, scaling, where, context) for scaling in (wide, narrow))
    if local.get("rope_scaling", "none") != "none" or local["rope_base"] != found["rope_base"]:
        what = "RoPE of layers with a window that is scaled, or has a base of its own"
        raise inexpressible(where, what, "Layers that are not global turn unscaled here, from the same base")
    if "rope_scaling" in found:
        found["rope_global_layers"] = shortest(tuple("on" if kind == kinds[0] else "off" for kind in layer_types))
    return found


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} has rope_scaling {value!r}.", "It must be a JSON object.", "Restore the file.")
    return value


def _said(values: dict[str, Any], scaling: dict[str, Any]) -> dict[str, Any]:
    """Keys of the object for rope over those of the file; a null in it says nothing."""
    return {**values, **{key: value for key, value in scaling.items() if value is not None}}


def _part(values: dict[str, Any], scaling: dict[str, Any], where: str, head_dim: int) -> dict[str, Any]:
    """How much of a head turns; nothing where all of it does."""
    part = number(_said(values, scaling), "partial_rotary_factor", where, 1.0)
    if part == 1:
        return {}
    turned = int(head_dim * part)
    if not 0 < turned < head_dim or turned % 2:
        raise inexpressible(where, f"partial_rotary_factor {part:g} of heads of {head_dim}", "RoPE turns pairs of features")
    return {"rope_dim": turned}


def _stretching(values: dict[str, Any], scaling: dict[str, Any], where: str, context: int, model: str = "") -> dict[str, Any]:
    base = number(_said(values, scaling), "rope_theta", where, 10000.0)
    if not base > 1:
        raise CheckpointError(f"{where} has rope_theta {base:g}.", "It must be over 1.", "Restore the file.")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return {"rope_base": base}
    if model == "phi3":  # whose earlier names for it are others
        return {"rope_base": base, **_longrope(values, scaling, where, context)}
    if kind in ("longrope", "su"):
        why = "Of texts past the original context programs keep earlier positions as they were, or do not, but in phi3"
        raise inexpressible(where, f"RoPE of the type {kind!r}", why)
    if kind not in ("linear", "llama3", "yarn"):
        raise inexpressible(where, f"RoPE of the type {kind!r}", "RoPE here is default, linear, llama3 or yarn")
    found: dict[str, Any] = {"rope_base": base, "rope_scaling": kind, "rope_factor": number(scaling, "factor", where)}
    if kind == "linear":
        return found
    found["rope_original_len"] = _original_length(values, scaling, where, context)
    if kind == "llama3":
        low, high = number(scaling, "low_freq_factor", where), number(scaling, "high_freq_factor", where)
        return found | {"rope_low_freq_factor": low, "rope_high_freq_factor": high}
    latent = model in LATENT
    _refuse_other_yarn(scaling, found["rope_factor"], where, latent)
    return found | (_yarn_of_latents(scaling, found["rope_factor"], where) if latent else {})


def _longrope(values: dict[str, Any], scaling: dict[str, Any], where: str, context: int) -> dict[str, Any]:
    """The original context stands beside the scaling; the factor is what the context is over it, unless it is said."""
    original = _original_length(values, scaling, where, context)
    if odd := [name for name in ("short_mscale", "long_mscale") if scaling.get(name) is not None]:
        raise inexpressible(where, f"RoPE with {odd[0]}", "Short and long sequences share one factor of cosines and sines here")
    factor, attention = number(scaling, "factor", where, context / original), number(scaling, "attention_factor", where, 0.0)
    if factor <= 1:  # it multiplies nothing there, so it is said
        factor, attention = 2.0, attention or 1.0
    return {
        "rope_scaling": "longrope",
        "rope_factor": factor,
        "rope_original_len": original,
        "rope_attention_factor": attention,
        "rope_short_factors": _numbers(scaling, "short_factor", where),
        "rope_long_factors": _numbers(scaling, "long_factor", where),
    }


def _numbers(scaling: dict[str, Any], key: str, where: str) -> tuple[float, ...]:
    factors = scaling.get(key)
    if not isinstance(factors, list) or not all(type(factor) in (int, float) for factor in factors):
        raise CheckpointError(f"{where} has no {key} of numbers.", "longrope has one for each turned pair.", "Restore the file.")
    return tuple(map(float, factors))


def _original_length(values: dict[str, Any], scaling: dict[str, Any], where: str, context: int) -> int:
    """The context before it was extended, which may stand beside the scaling or in it."""
    key = "original_max_position_embeddings"
    lengths = {integer(place, key, where, limit=MAX_POSITION) for place in (values, scaling) if place.get(key) is not None}
    if len(lengths) > 1:
        both = " and ".join(map(str, sorted(lengths)))
        raise CheckpointError(f"{where} gives {key} twice, as {both}.", "Programs differ in which one they take.", "Correct the file.")
    return lengths.pop() if lengths else context


def _refuse_other_yarn(scaling: dict[str, Any], factor: float, where: str, latent: bool) -> None:
    expected = {"beta_fast": rope.BETA_FAST, "beta_slow": rope.BETA_SLOW}
    expected |= {} if latent else {"attention_factor": _mscale(factor)}
    for name, plain in expected.items():
        if not math.isclose(number(scaling, name, where, plain) or plain, plain, rel_tol=1e-6):
            raise inexpressible(where, f"YaRN with {name} {scaling[name]:g}", f"YaRN here has {plain:g}")
    mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if (mscale and all_dim and not latent) or scaling.get("truncate") is False:
        raise inexpressible(where, "YaRN with mscale_all_dim or without truncation", "YaRN here has neither")


def _mscale(factor: float, by: float = 1.0) -> float:
    return 0.1 * by * math.log(max(factor, 1.0)) + 1


def _yarn_of_latents(scaling: dict[str, Any], factor: float, where: str) -> dict[str, Any]:
    """What multiplies cosines and sines there is over what multiplies all scores, which are multiplied by the square of the latter."""
    mscale, all_dim = (number(scaling, name, where, 0.0) for name in ("mscale", "mscale_all_dim"))
    plain = _mscale(factor, all_dim) if all_dim else 1.0
    own = number(scaling, "attention_factor", where, 0.0)
    turned = own * plain if own else _mscale(factor, mscale) if mscale and all_dim else _mscale(factor) * plain
    return {
        "rope_attention_factor": 0.0 if turned == _mscale(factor) else turned,
        "mla_plain_factor": 0.0 if plain == turned else plain,
    }


def _factors_of_latents(config: ModelConfig) -> dict[str, Any]:
    """The keys that are read so."""
    turned, plain, log = rope.attention_factor(config), rope.plain_factor(config), 0.1 * math.log(config.rope_factor)
    mscale, all_dim = (round((factor - 1) / log, 12) for factor in (turned, plain))
    if (mscale > 0 and all_dim > 0) or (all_dim == 0 and turned == _mscale(config.rope_factor)):
        return {"mscale": mscale, "mscale_all_dim": all_dim}
    said = {"attention_factor": turned / plain}  # programs pass over an mscale of 0, or one beside an mscale_all_dim of 0
    return said | ({"mscale_all_dim": all_dim} if all_dim else {})
