"""What config.json says of Gated DeltaNet beside attention (Qwen3-Next, Qwen 3.5): written from a ModelConfig, read into fields of one."""

from collections.abc import Mapping
from typing import Any

from convert.hf_rope import turned_dim
from convert.hf_values import asks_for, inexpressible, integer, shortest
from smedjan_common.config import ModelConfig
from smedjan_common.model.mixers import gated_deltanet


def written(config: ModelConfig) -> dict[str, Any]:
    """Which layers attend, how much of a head turns, and the heads of the others."""
    own = gated_deltanet.heads(config)
    kinds = ["full_attention" if config.mixer_of(layer) == "attention" else "linear_attention" for layer in range(config.layers)]
    return {
        "layer_types": kinds,
        "full_attention_interval": len(config.mixer),
        "attn_output_gate": True,
        "linear_conv_kernel_dim": config.conv_width,
        "linear_key_head_dim": own.key_dim,
        "linear_value_head_dim": own.value_dim,
        "linear_num_key_heads": own.keys,
        "linear_num_value_heads": own.values,
        "partial_rotary_factor": turned_dim(config) / config.head_dim,
    }


def regular(config: ModelConfig) -> bool:
    """Whether attention comes in every so many layers, as programs take it that read an interval alone."""
    kinds, every = [config.mixer_of(layer) for layer in range(config.layers)], len(config.mixer)
    return all((kind == "attention") == ((layer + 1) % every == 0) for layer, kind in enumerate(kinds))


def read(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Gated DeltaNet's heads are the model's where they are as many, of the same size. Whether there are gates its tensors tell."""
    kinds, layers = values.get("layer_types"), integer(values, "num_hidden_layers", where)
    if kinds is None:
        every = integer(values, "full_attention_interval", where, 4)
        kinds = ["linear_attention" if (layer + 1) % every else "full_attention" for layer in range(layers)]
    if not isinstance(kinds, list) or len(kinds) != layers or set(kinds) - {"linear_attention", "full_attention"}:
        raise inexpressible(where, f"layer_types {kinds!r}", "Each layer is linear_attention or full_attention")
    asks_for(values, where, attn_output_gate=True)
    found: dict[str, Any] = {"qk_norm": True, "attention_gate": True, "conv_width": integer(values, "linear_conv_kernel_dim", where)}
    found["mixer"] = shortest(tuple("attention" if kind == "full_attention" else "gated-deltanet" for kind in kinds))
    same = {"delta_key_heads": ("linear_num_key_heads", "num_key_value_heads"), "delta_key_size": ("linear_key_head_dim", "head_dim")}
    same |= {
        "delta_value_heads": ("linear_num_value_heads", "num_attention_heads"),
        "delta_value_size": ("linear_value_head_dim", "head_dim"),
    }
    for name, (key, usual) in same.items():
        value = integer(values, key, where)
        found[name] = 0 if value == integer(values, usual, where) else value
    return found
