"""config.json of a model of families.py <-> ModelConfig. Its rotary embedding: hf_rope.py; what each family has more: hf_keys.py."""

from typing import Any

from convert.families import FAMILIES, family_of
from convert.hf_keys import READ, WRITTEN, rope_layers
from convert.hf_rope import rope_by_layer, rope_from_hf, rope_to_hf
from convert.hf_values import inexpressible, integer, number, shortest
from smedjan_common.config import ModelConfig
from smedjan_common.errors import CheckpointError
from smedjan_common.model.json_fields import MAX_POSITION

_MOST_LAYERS = 1 << 14  # finding the pattern of more would take minutes, before a tensor shows that there are not so many


def to_hf(config: ModelConfig, dtype: str, eos_id: int | None) -> dict[str, Any]:
    """config.json of the architecture that has the model. dtype: NumPy's name of the weights'. Raises ConfigError where none does."""
    kind = family_of(config, "Hugging Face")
    base, scaling = rope_to_hf(config)
    values = {
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
        "attention_dropout": 0.0,
        "initializer_range": min(config.init_std, 1.0),  # transformers refuses more
        "use_cache": True,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "pad_token_id": None,
        "torch_dtype": dtype,
    } | WRITTEN.get(kind, lambda config: {})(config)
    if "partial_rotary_factor" in values:
        values["rope_parameters"]["partial_rotary_factor"] = values["partial_rotary_factor"]
    if kind in _FULL_EVERY:
        plain = {"rope_type": "default", "rope_theta": base}
        values["rope_parameters"] = {"full_attention": values["rope_parameters"], "sliding_attention": plain}
    if kind != "qwen3_5":
        return values
    outer = ("architectures", "model_type", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype")
    return {name: values[name] for name in outer} | {"text_config": values | {"model_type": "qwen3_5_text"}}


def from_hf(values: dict[str, Any], where: str, tied: bool = True) -> ModelConfig:
    """The ModelConfig of a config.json; `vocab_size` is the rows of its embedding, `tied` what its tensors say of the head. `where` names
    the file in errors.

    Raises CheckpointError for a value that is missing or no number, ConfigError for a model that cannot be expressed.
    """
    values = of_language(values)
    kind = str(values.get("model_type"))
    if kind not in FAMILIES:
        what = f"{where} is of a model of the type {values.get('model_type')!r}."
        raise CheckpointError(what, f"These are read: {', '.join(FAMILIES)}.", "Choose a model of one of them.")
    values = {**FAMILIES[kind].defaults, **values}
    _refuse_what_is_other(values, where)
    dim, heads = integer(values, "hidden_size", where), integer(values, "num_attention_heads", where)
    head_dim = integer(values, "head_dim", where, max(1, dim // heads))
    layers = integer(values, "num_hidden_layers", where)
    if layers > _MOST_LAYERS:
        raise CheckpointError(f"{where} promises {layers} layers.", f"At most {_MOST_LAYERS} are read.", "Restore the file.")
    context = integer(values, "max_position_embeddings", where, limit=MAX_POSITION)
    if kind in _FULL_EVERY and values.get("layer_types") is None:
        values["layer_types"] = [_LAYER_TYPES[(layer + 1) % _FULL_EVERY[kind] == 0] for layer in range(layers)]
    bias = values.get("attention_bias") is True
    found: dict[str, Any] = {
        "vocab_size": integer(values, "vocab_size", where),
        "dim": dim,
        "layers": layers,
        "heads": heads,
        "kv_heads": integer(values, "num_key_value_heads", where, heads),
        "ffn_dim": integer(values, "intermediate_size", where),
        "context_length": context,
        "norm_eps": number(values, "rms_norm_eps", where, 1e-6),
        "init_std": number(values, "initializer_range", where, 0.02),
        "tied_head": tied,
        "head_size": 0 if head_dim * heads == dim else head_dim,
        "qkv_bias": bias,
        "o_bias": bias,
        **_window(values, where, kind, layers, context),
        **_rope(values, where, kind, context, head_dim),
    }
    config = ModelConfig(**found | READ.get(kind, lambda values, where: {})(values, where))
    config.validate()
    return config


def of_language(values: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of the language model, which may be a part of a larger one (text_config), or have been saved by itself."""
    inner, kind = values.get("text_config"), values.get("model_type")
    whole = {**values, **(inner if isinstance(inner, dict) else {})}
    kind = whole.get("model_type") if kind is None else kind
    return whole | {"model_type": kind.removesuffix("_text") if isinstance(kind, str) else kind}


def _refuse_what_is_other(values: dict[str, Any], where: str) -> None:
    """Raises ConfigError for the first setting that changes what the model computes and that smedjan does not have."""
    if values.get("quantization_config") is not None:
        raise inexpressible(where, "quantised weights", "Training starts from whole ones", "the model in bfloat16 or float32")
    if values.get("hidden_act", "silu") not in {"silu", "swish"}:
        raise inexpressible(where, f"the activation {values['hidden_act']!r}", "The feed-forward here is SwiGLU, with SiLU")
    if values.get("rope_traditional") is True:
        raise inexpressible(where, "rope_traditional", "RoPE here turns halves of a head, and programs disagree about that key")


def _rope(values: dict[str, Any], where: str, kind: str, context: int, head_dim: int) -> dict[str, Any]:
    if kind in _FULL_EVERY:
        return rope_by_layer(values, where, context, values["layer_types"], FAMILIES[kind].defaults["rope_theta"])
    found = rope_from_hf(values, where, context, head_dim, kind)
    if "rope_dim" in found and "rope_dim" not in FAMILIES[kind].options:
        parted = ", ".join(name for name, family in FAMILIES.items() if "rope_dim" in family.options)
        raise inexpressible(where, "a partial rotary embedding", f"Programs do not agree what that means in {kind}; {parted} have it")
    return found


# architectures whose layers all have the window but for every so many, which turn in another way
_FULL_EVERY = {"olmo3": 4}
_LAYER_TYPES = ("sliding_attention", "full_attention")


def _window(values: dict[str, Any], where: str, kind: str, layers: int, context: int) -> dict[str, Any]:
    """The sliding window, which counts a position itself as --window does, and which layers have it; nothing where it is as long as the
    context, or none is used."""
    if kind in ("granitemoehybrid", "qwen3_5", "qwen3_next", "qwen3_5_moe"):
        return {}  # its layers are of other kinds
    windowed = _windowed(values, where, kind, layers)
    if "on" not in windowed:
        return {}
    window = integer(values, "sliding_window", where, limit=MAX_POSITION)
    if window >= context:
        return {}
    if "off" in windowed and "window_layers" not in FAMILIES[kind].options:
        what = f"a sliding window of {window} positions in {windowed.count('on')} of {layers} layers"
        raise inexpressible(where, what, f"Programs do not agree what that means in {kind}; {', '.join(_SOME)} have it")
    return {"window": window, "window_layers": shortest(tuple(windowed))}


_SOME = [name for name, family in FAMILIES.items() if "window_layers" in family.options]


def _windowed(values: dict[str, Any], where: str, kind: str, layers: int) -> list[str]:
    """Of each layer, on where it has the window."""
    kinds = values.get("layer_types")
    if kinds is not None:
        if odd := sorted(set(kinds) - set(_LAYER_TYPES)):
            raise inexpressible(where, f"layers of the type {odd[0]!r}", "Layers here are those of --mixer")
        if len(kinds) != layers:
            raise CheckpointError(f"{where} has {len(kinds)} layer_types.", f"The model has {layers} layers.", "Restore the file.")
        return ["on" if each == "sliding_attention" else "off" for each in kinds]
    if values.get("sliding_window") is None:
        return ["off"] * layers
    if kind in ("mistral", "ministral", "mixtral", "phi3"):
        return ["on"] * layers
    if not values.get("use_sliding_window"):
        return ["off"] * layers
    if kind == "smollm3":
        return ["on" if turns == "off" else "off" for turns in rope_layers(values, where)]
    full = min(values.get("max_window_layers", layers), layers)
    return ["off"] * full + ["on"] * (layers - full)
