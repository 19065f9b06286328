"""The same tensor in three formats: one row each. `{i}` is the layer."""

from typing import NamedTuple


class Row(NamedTuple):
    """The name in smedjan, in transformers, in llama.cpp."""

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

POST_ROWS = (  # of a model whose norms come after
    Row("layers.{i}.mixer_post_norm.weight", "model.layers.{i}.post_attention_layernorm.weight", "blk.{i}.post_attention_norm.weight"),
    Row("layers.{i}.ffn_post_norm.weight", "model.layers.{i}.post_feedforward_layernorm.weight", "blk.{i}.post_ffw_norm.weight"),
)

# tensors that only some models have, by what of a ModelConfig says so
OPTIONAL_ROWS: dict[str, tuple[Row, ...]] = {
    "qkv_bias": tuple(
        Row(f"layers.{{i}}.mixer.{n}_proj.bias", f"model.layers.{{i}}.self_attn.{n}_proj.bias", f"blk.{{i}}.attn_{n}.bias") for n in "qkv"
    ),
    "o_bias": (Row("layers.{i}.mixer.o_proj.bias", "model.layers.{i}.self_attn.o_proj.bias", "blk.{i}.attn_output.bias"),),
    "qk_norm": tuple(
        Row(f"layers.{{i}}.mixer.{n}_norm.weight", f"model.layers.{{i}}.self_attn.{n}_norm.weight", f"blk.{{i}}.attn_{n}_norm.weight")
        for n in "qk"
    ),
}
HEAD_ROW = Row("head.weight", "lm_head.weight", "output.weight")
