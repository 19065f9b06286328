"""config.json of a model of families.py <-> ModelConfig.

Written so that transformers 5 (`rope_parameters`), transformers 4 and mlx-lm (`rope_theta`, `rope_scaling`) read the same model:
    none   rope_type default
    ntk    rope_type default with the base that NTK-aware scaling comes to, base * s^(K/(K-2)): nobody has a static NTK-aware form
    linear, llama3   by their names
    yarn   rope_type yarn with factor, original_max_position_embeddings, beta_fast 32, beta_slow 1. The attention factor is left to
           the formula that all readers share, 0.1 ln s + 1; llama.cpp before 2026 would apply one that is written down twice.
"""

import math
from typing import Any

from convert.families import FAMILIES, family_of
from smedjan_common.config import ModelConfig
from smedjan_common.errors import CheckpointError, ConfigError
from smedjan_common.model import rope
from smedjan_common.model.json_fields import MAX_EXTENT, MAX_POSITION

_NOT_HERE = "The model cannot be expressed here."


def to_hf(config: ModelConfig, dtype: str, eos_id: int | None) -> dict[str, Any]:
    """config.json of the architecture that has the model. dtype: NumPy's name of the weights'. Raises ConfigError where none does."""
    kind = family_of(config, "Hugging Face")
    base, scaling = rope_to_hf(config)
    return {
        "architectures": [FAMILIES[kind].architecture],
        "model_type": kind,
        "vocab_size": config.padded_vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": base,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": base, **(scaling or {"rope_type": "default"})},
        "tie_word_embeddings": config.tied_head,
        "attention_bias": config.o_bias,
        "mlp_bias": False,
        **({"sliding_window": config.window or None} if kind == "mistral" else {}),
        "attention_dropout": 0.0,
        "initializer_range": min(config.init_std, 1.0),  # transformers refuses more
        "use_cache": True,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "pad_token_id": None,
        "torch_dtype": dtype,
    }


def rope_to_hf(config: ModelConfig) -> tuple[float, dict[str, Any] | None]:
    """(base, scaling) of the rotary embedding: the scaling is None where a base says it all."""
    if config.rope_scaling == "yarn":
        return config.rope_base, {
            "rope_type": "yarn",
            "factor": config.rope_factor,
            "original_max_position_embeddings": rope.original_length(config),
            "beta_fast": rope.BETA_FAST,
            "beta_slow": rope.BETA_SLOW,
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
        return rope.ntk_base(config, config.head_dim), None
    return config.rope_base, None


def from_hf(values: dict[str, Any], where: str, tied: bool = True) -> ModelConfig:
    """The ModelConfig of a config.json; `vocab_size` is the rows of its embedding, `tied` what its tensors say of the head. `where` names
    the file in errors.

    Raises CheckpointError for a value that is missing or no number, ConfigError for a model that cannot be expressed.
    """
    kind = str(values.get("model_type"))
    if kind not in FAMILIES:
        what = f"{where} is of a model of the type {values.get('model_type')!r}."
        raise CheckpointError(what, f"These are read: {', '.join(FAMILIES)}.", "Choose a model of one of them.")
    values = {**FAMILIES[kind].defaults, **values}
    _refuse_what_is_other(values, where)
    dim, heads = _integer(values, "hidden_size", where), _integer(values, "num_attention_heads", where)
    head_dim = _integer(values, "head_dim", where, max(1, dim // heads))
    layers, context = _integer(values, "num_hidden_layers", where), _integer(values, "max_position_embeddings", where, limit=MAX_POSITION)
    bias = kind == "qwen2" or values.get("attention_bias") is True
    config = ModelConfig(
        vocab_size=_integer(values, "vocab_size", where),
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=_integer(values, "num_key_value_heads", where, heads),
        ffn_dim=_integer(values, "intermediate_size", where),
        context_length=context,
        norm_eps=_number(values, "rms_norm_eps", where, 1e-6),
        init_std=_number(values, "initializer_range", where, 0.02),
        window=_window(values, where, kind, layers, context),
        tied_head=tied,
        head_size=0 if head_dim * heads == dim else head_dim,
        qk_norm=kind == "qwen3",
        qkv_bias=bias,
        o_bias=bias and kind != "qwen2",
        **_rope_from_hf(values, where, context),
    )
    config.validate()
    return config


def _refuse_what_is_other(values: dict[str, Any], where: str) -> None:
    """Raises ConfigError for the first setting that changes what the model computes and that smedjan does not have."""
    if values.get("quantization_config") is not None:
        raise _inexpressible(where, "quantised weights", "Training starts from whole ones", "the model in bfloat16 or float32")
    if values.get("hidden_act", "silu") not in {"silu", "swish"}:
        raise _inexpressible(where, f"the activation {values['hidden_act']!r}", "The feed-forward here is SwiGLU, with SiLU")
    if values.get("rope_traditional") is True:
        raise _inexpressible(where, "rope_traditional", "RoPE here turns halves of a head, and programs disagree about that key")


def _window(values: dict[str, Any], where: str, kind: str, layers: int, context: int) -> int:
    """The sliding window, which counts a position itself as --window does; 0 where it is as long as the context, or none is used."""
    kinds = values.get("layer_types")
    if kinds is None:
        from_layer = values.get("max_window_layers", layers) if values.get("use_sliding_window") else 0 if kind == "mistral" else layers
        windowed = layers - min(from_layer, layers) if values.get("sliding_window") is not None else 0
    elif odd := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise _inexpressible(where, f"layers of the type {odd[0]!r}", "Layers here are those of --mixer")
    else:
        windowed = kinds.count("sliding_attention")
    if not windowed:
        return 0
    window = _integer(values, "sliding_window", where, limit=MAX_POSITION)
    if window < context and windowed < layers:
        raise _inexpressible(
            where, f"a sliding window of {window} positions in {windowed} of {layers} layers", "All layers have one --window"
        )
    return window if window < context else 0


def _rope_from_hf(values: dict[str, Any], where: str, context: int) -> dict[str, Any]:
    """The rope fields of a ModelConfig from either generation's keys."""
    scaling = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        raise CheckpointError(f"{where} has rope_scaling {scaling!r}.", "It must be a JSON object.", "Restore the file.")
    base = _number({**values, **scaling}, "rope_theta", where, 10000.0)
    if not base > 1:
        raise CheckpointError(f"{where} has rope_theta {base:g}.", "It must be over 1.", "Restore the file.")
    if _number({**values, **scaling}, "partial_rotary_factor", where, 1.0) != 1:
        raise _inexpressible(where, "a partial rotary embedding", "RoPE here turns whole heads")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return {"rope_base": base}
    if kind not in ("linear", "llama3", "yarn"):
        raise _inexpressible(where, f"RoPE of the type {kind!r}", "RoPE here is default, linear, llama3 or yarn")
    found: dict[str, Any] = {"rope_base": base, "rope_scaling": kind, "rope_factor": _number(scaling, "factor", where)}
    if kind == "linear":
        return found
    found["rope_original_len"] = _original_length(values, scaling, where, context)
    if kind == "llama3":
        low, high = _number(scaling, "low_freq_factor", where), _number(scaling, "high_freq_factor", where)
        return found | {"rope_low_freq_factor": low, "rope_high_freq_factor": high}
    _refuse_other_yarn(scaling, found["rope_factor"], where)
    return found


def _original_length(values: dict[str, Any], scaling: dict[str, Any], where: str, context: int) -> int:
    """The context before it was extended, which may stand beside the scaling or in it."""
    key = "original_max_position_embeddings"
    lengths = {_integer(place, key, where, limit=MAX_POSITION) for place in (values, scaling) if place.get(key) is not None}
    if len(lengths) > 1:
        both = " and ".join(map(str, sorted(lengths)))
        raise CheckpointError(f"{where} gives {key} twice, as {both}.", "Programs differ in which one they take.", "Correct the file.")
    return lengths.pop() if lengths else context


def _refuse_other_yarn(scaling: dict[str, Any], factor: float, where: str) -> None:
    expected = {"beta_fast": rope.BETA_FAST, "beta_slow": rope.BETA_SLOW, "attention_factor": 0.1 * math.log(max(factor, 1.0)) + 1}
    for name, plain in expected.items():
        if not math.isclose(_number(scaling, name, where, plain) or plain, plain, rel_tol=1e-6):
            raise _inexpressible(where, f"YaRN with {name} {scaling[name]:g}", f"YaRN here has {plain:g}")
    mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if (mscale and all_dim) or scaling.get("truncate") is False:
        raise _inexpressible(where, "YaRN with mscale_all_dim or without truncation", "YaRN here has neither")


def _integer(values: dict[str, Any], key: str, where: str, default: int | None = None, limit: int = MAX_EXTENT) -> int:
    value: Any = default if values.get(key) is None else values[key]
    if type(value) is not int or not 1 <= value <= limit:
        raise CheckpointError(f"{where} has {key} {_short(value)}.", "It must be a positive whole number.", "Restore the file.")
    return value


def _number(values: dict[str, Any], key: str, where: str, default: float | None = None) -> float:
    value: Any = default if values.get(key) is None else values[key]
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
        raise CheckpointError(f"{where} has {key} {_short(value)}.", "It must be a number.", "Restore the file.")
    return float(value)


def _inexpressible(where: str, what: str, why: str, fix: str = "a model that is the same without it") -> ConfigError:
    return ConfigError(f"{where} asks for {what}. {_NOT_HERE}", f"{why}.", f"Only this is missing: choose {fix}.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
