"""The same tensor in three formats: one row each. `{i}` is the layer."""

from typing import NamedTuple

from smedjan_common.config import ModelConfig
from smedjan_common.errors import ConfigError


class Row(NamedTuple):
    """The name in smedjan, in transformers' Llama, in llama.cpp."""

    ours: str
    hf: str
    gguf: str


MODEL_ROWS = (
    Row("embed.weight", "model.embed_tokens.weight", "token_embd.weight"),
    Row("norm.weight", "model.norm.weight", "output_norm.weight"),
)
LAYER_ROWS = (
    Row("layers.{i}.mixer_norm.weight", "model.layers.{i}.input_layernorm.weight", "blk.{i}.attn_norm.weight"),
    Row("layers.{i}.mixer.q_proj.weight", "model.layers.{i}.self_attn.q_proj.weight", "blk.{i}.attn_q.weight"),
    Row("layers.{i}.mixer.k_proj.weight", "model.layers.{i}.self_attn.k_proj.weight", "blk.{i}.attn_k.weight"),
    Row("layers.{i}.mixer.v_proj.weight", "model.layers.{i}.self_attn.v_proj.weight", "blk.{i}.attn_v.weight"),
    Row("layers.{i}.mixer.o_proj.weight", "model.layers.{i}.self_attn.o_proj.weight", "blk.{i}.attn_output.weight"),
    Row("layers.{i}.ffn_norm.weight", "model.layers.{i}.post_attention_layernorm.weight", "blk.{i}.ffn_norm.weight"),
    Row("layers.{i}.ffn.gate_proj.weight", "model.layers.{i}.mlp.gate_proj.weight", "blk.{i}.ffn_gate.weight"),
    Row("layers.{i}.ffn.up_proj.weight", "model.layers.{i}.mlp.up_proj.weight", "blk.{i}.ffn_up.weight"),
    Row("layers.{i}.ffn.down_proj.weight", "model.layers.{i}.mlp.down_proj.weight", "blk.{i}.ffn_down.weight"),
)

# What of a ModelConfig the Llama layout can say; a field that is added later is refused until it is thought about here.
EXPRESSED = {
    *("vocab_size", "dim", "layers", "heads", "kv_heads", "ffn_dim", "context_length", "mixer", "ffn", "norm_eps"),
    *("rope_base", "rope_scaling", "rope_factor", "rope_original_len", "init_std"),
}


def rows(layers: int) -> list[Row]:
    """Every tensor of a model, in the order of the forward pass."""
    embed, norm = MODEL_ROWS
    return [embed, *(Row(*(name.format(i=i) for name in row)) for i in range(layers) for row in LAYER_ROWS), norm]


def check_llama(config: ModelConfig, target: str) -> None:
    """Raises ConfigError, by name, for what a Llama cannot be: other mixers, other feed-forwards, options added since."""
    for what, names, known in (("mixer", config.mixer, "attention"), ("feed-forward", config.ffn, "swiglu")):
        if odd := sorted(set(names) - {known}):
            raise ConfigError(
                f"A model with the {what} {odd[0]} has no {target} form.",
                f"The Llama layout, which other programs run, has {known} only.",
                "Keep it neutral: both backends run it.",
            )
    values, plain = config.to_dict(), ModelConfig(64, 2, 1, 1, 1, 1).to_dict()
    if odd := sorted(name for name in values.keys() - EXPRESSED if values[name] != plain[name]):
        raise ConfigError(
            f"A model with {odd[0]} = {values[odd[0]]} has no {target} form.",
            "The Llama layout cannot express it.",
            "Keep it neutral: both backends run it.",
        )
