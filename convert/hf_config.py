"""config.json of a Llama-family model <-> ModelConfig.

Written so that transformers 5 (`rope_parameters`), transformers 4 and mlx-lm (`rope_theta`, `rope_scaling`) read the same model:
    none   rope_type default
    ntk    rope_type default with the base that NTK-aware scaling comes to, base * s^(K/(K-2)): nobody has a static NTK-aware form
    yarn   rope_type yarn with factor, original_max_position_embeddings, beta_fast 32, beta_slow 1. The attention factor is left to
           the formula that all readers share, 0.1 ln s + 1; llama.cpp before 2026 would apply one that is written down twice.
"""

import math
from typing import Any

from convert.names import check_llama
from smedjan_common.config import ModelConfig
from smedjan_common.errors import CheckpointError, ConfigError, near
from smedjan_common.model import rope
from smedjan_common.model.json_fields import MAX_EXTENT, MAX_POSITION

MODEL_TYPES = ("llama", "mistral", "qwen2")
_MISTRAL_WINDOW = 4096  # what transformers takes where config.json has no sliding_window
_NOT_HERE = "The model cannot be expressed here."


def to_hf(config: ModelConfig, dtype: str, eos_id: int | None) -> dict[str, Any]:
    """config.json for LlamaForCausalLM. dtype: NumPy's name of the weights'. Raises ConfigError for what a Llama cannot be."""
    check_llama(config, "Hugging Face Llama")
    base, scaling = rope_to_hf(config)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
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
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
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


def from_hf(values: dict[str, Any], where: str) -> ModelConfig:
    """The ModelConfig of a config.json; `vocab_size` is the rows of its embedding. `where` names the file in errors.

    Raises CheckpointError for a value that is missing or no number, ConfigError for a model that cannot be expressed.
    """
    kind = values.get("model_type")
    if kind not in MODEL_TYPES:
        raise CheckpointError(
            f"{where} is of a model of the type {kind!r}.", "Only Llama-like models can be converted.", near(str(kind), MODEL_TYPES)
        )
    _refuse_what_is_other(values, where)
    dim, heads = _integer(values, "hidden_size", where), _integer(values, "num_attention_heads", where)
    kv_heads = _integer(values, "num_key_value_heads", where, heads if kind == "llama" else None)
    head_dim = _integer(values, "head_dim", where, dim // heads)
    if head_dim * heads != dim:
        raise _inexpressible(where, f"head_dim {head_dim} for hidden_size {dim} and {heads} heads", "Heads here share the width evenly")
    context = _integer(values, "max_position_embeddings", where, 2048 if kind == "llama" else None, limit=MAX_POSITION)
    config = ModelConfig(
        vocab_size=_integer(values, "vocab_size", where),
        dim=dim,
        layers=_integer(values, "num_hidden_layers", where),
        heads=heads,
        kv_heads=kv_heads,
        ffn_dim=_integer(values, "intermediate_size", where),
        context_length=context,
        norm_eps=_number(values, "rms_norm_eps", where, 1e-6),
        init_std=_number(values, "initializer_range", where, 0.02),
        window=_window(values, where, context),
        **_rope_from_hf(values, where, context),
    )
    config.validate()
    return config


def _refuse_what_is_other(values: dict[str, Any], where: str) -> None:
    """Raises ConfigError for the first setting that changes what the model computes and that smedjan does not have."""
    if values.get("quantization_config") is not None:
        raise _inexpressible(where, "quantised weights", "Training starts from whole ones")
    if values.get("hidden_act", "silu") not in {"silu", "swish"}:
        raise _inexpressible(where, f"the activation {values['hidden_act']!r}", "The feed-forward here is SwiGLU, with SiLU")
    window = values.get("sliding_window") if values["model_type"] == "qwen2" and values.get("use_sliding_window") else None
    if window is not None and window < values.get("max_position_embeddings", 0):
        raise _inexpressible(where, f"a sliding window of {window} positions in some layers", "Attention here has one window in all layers")
    if odd := sorted(set(values.get("layer_types") or ()) - {"full_attention"}):
        raise _inexpressible(where, f"layers of the type {odd[0]!r}", "Attention here has one window in all layers, --window")


def _window(values: dict[str, Any], where: str, context: int) -> int:
    """Mistral's sliding window, which counts a position itself as --window does; 0 where it is as long as the context."""
    if values["model_type"] != "mistral" or values.get("sliding_window", _MISTRAL_WINDOW) is None:
        return 0
    window = _integer(values, "sliding_window", where, _MISTRAL_WINDOW, limit=MAX_POSITION)
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
    if kind != "yarn":
        raise _inexpressible(where, f"RoPE of the type {kind!r}", "RoPE here is default or yarn")
    factor = _number(scaling, "factor", where)
    expected = {"beta_fast": rope.BETA_FAST, "beta_slow": rope.BETA_SLOW, "attention_factor": 0.1 * math.log(max(factor, 1.0)) + 1}
    for name, plain in expected.items():
        if not math.isclose(_number(scaling, name, where, plain) or plain, plain, rel_tol=1e-6):
            raise _inexpressible(where, f"YaRN with {name} {scaling[name]:g}", f"YaRN here has {plain:g}")
    mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if (mscale and all_dim) or scaling.get("truncate") is False:
        raise _inexpressible(where, "YaRN with mscale_all_dim or without truncation", "YaRN here has neither")
    length = _integer(scaling, "original_max_position_embeddings", where, context, limit=MAX_POSITION)
    return {"rope_base": base, "rope_scaling": "yarn", "rope_factor": factor, "rope_original_len": length}


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


def _inexpressible(where: str, what: str, why: str) -> ConfigError:
    return ConfigError(f"{where} asks for {what}. {_NOT_HERE}", f"{why}.", "Choose another model: llama, mistral or qwen2 without it.")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
