"""Tensors of Gated DeltaNet with attention in GGUF: qwen35 and qwen3next.

Norms are written as they are here, not less one. Attention has an output gate there, with its queries, and so have shared experts: of a
model without gates they are 0, so a half, and what follows is doubled. In qwen35 value head j of H reads key head j mod Hk, here
j // (H / Hk): value heads are in another order there.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.gguf_fields import Fields
from convert.gguf_layouts import decay, feed_forward, kept_as, norms, whole
from convert.hf_rope import turned_dim
from convert.hf_values import shortest
from convert.names import LAYER_ROWS, OPTIONAL_ROWS
from convert.ties import Tie, by_key_head, gated, joined, reordered, same, scaled, zeros
from smedjan_common.config import ModelConfig
from smedjan_common.model.ffns.experts import width
from smedjan_common.model.mixers import gated_deltanet

_SECOND = "post_attention_norm"


def qwen35(config: ModelConfig) -> list[Tie]:
    own, D, ties = gated_deltanet.heads(config), config.dim, []
    heads = np.arange(own.values).reshape(own.keys, -1).T.reshape(-1)  # theirs -> ours
    rows = (heads[:, None] * own.value_dim + np.arange(own.value_dim)).reshape(-1)
    sizes = (own.key_features, own.key_features, own.value_features)
    for i in range(config.layers):
        ours, at = f"layers.{i}.mixer.", f"blk.{i}."
        ties += norms(config, i, _SECOND)
        if config.mixer_of(i) == "attention":
            ties += _gated_attention(config, i)
        else:
            values = 2 * own.key_features  # where they begin among what is convolved
            convolved = np.concatenate([np.arange(values), values + rows])
            ties.append(_joined_in_order(ours, ("q", "k", "v"), f"{at}attn_qkv.weight", sizes, convolved, D))
            ties.append(reordered(f"{ours}z_proj.weight", f"{at}attn_gate.weight", rows, D))
            ties.append(reordered(f"{ours}b_proj.weight", f"{at}ssm_beta.weight", heads, D))
            ties.append(reordered(f"{ours}a_proj.weight", f"{at}ssm_alpha.weight", heads, D))
            ties.append(reordered(f"{ours}conv.weight", f"{at}ssm_conv1d.weight", convolved, config.conv_width))
            ties.append(reordered(f"{ours}dt_bias", f"{at}ssm_dt.bias", heads))
            ties.append(decay(f"{ours}A_log", f"{at}ssm_a", own.values, order=heads))
            ties.append(kept_as(config, f"{ours}norm.weight", f"{at}ssm_norm.weight"))
            ties.append(reordered(f"{ours}o_proj.weight", f"{at}ssm_out.weight", rows, D, axis=1))
        ties += feed_forward(config, i)
    return whole(config, [ties])


def qwen3next(config: ModelConfig) -> list[Tie]:
    own, D, ties = gated_deltanet.heads(config), config.dim, []
    sizes, R = [own.key_features, own.key_features, own.value_features], own.values // own.keys
    for i in range(config.layers):
        ours, at = f"layers.{i}.mixer.", f"blk.{i}."
        ties += norms(config, i, _SECOND)
        if config.mixer_of(i) == "attention":
            ties += _gated_attention(config, i)
        else:
            names = [f"{ours}{name}_proj.weight" for name in ("q", "k", "v")]
            ties.append(joined(names, f"{at}attn_qkv.weight", sizes, D))
            ties.append(by_key_head((f"{ours}b_proj.weight", f"{ours}a_proj.weight"), f"{at}ssm_ba.weight", own.keys, (R, R), D))
            more = {"z_proj.weight": "attn_gate.weight", "conv.weight": "ssm_conv1d.weight", "dt_bias": "ssm_dt.bias"}
            more |= {"norm.weight": "ssm_norm.weight", "o_proj.weight": "ssm_out.weight"}
            ties += [kept_as(config, f"{ours}{name}", f"{at}{theirs}") for name, theirs in more.items()]
            ties.append(decay(f"{ours}A_log", f"{at}ssm_a", own.values))
        ties += _gated_experts(config, i)
    return whole(config, [ties])


def _gated_experts(config: ModelConfig, layer: int) -> list[Tie]:
    down, gate = f"layers.{layer}.ffn.shared.down_proj.weight", f"blk.{layer}.ffn_gate_inp_shexp.weight"
    ties, D = feed_forward(config, layer), config.dim
    if config.shared_gate:
        return [*ties, same(f"layers.{layer}.ffn.shared_gate.weight", gate, (D,))]
    ties = [tie for tie in ties if tie.ours != (down,)]
    return [*ties, scaled(down, f"blk.{layer}.ffn_down_shexp.weight", 2, D, config.shared_experts * width(config)), zeros(gate, D)]


def lacks(config: ModelConfig) -> str:
    """What of a model llama.cpp does not do here, "" for nothing."""
    attends = [config.mixer_of(layer) == "attention" for layer in range(config.layers)]
    every = attends.index(True) + 1
    regular = attends == [(layer + 1) % every == 0 for layer in range(config.layers)]
    if not regular:
        return "layers with attention other than every so many"
    if config.delta_key_dim != config.delta_value_dim:
        return "heads of Gated DeltaNet whose keys and values differ in size"
    if "experts" in config.ffn and "swiglu" in config.ffn:
        return "dense layers between those with experts"
    if "experts" in config.ffn and not config.norm_topk_prob:
        return "weights of experts that do not add up to 1"
    return "biases" if config.qkv_bias else ""


def written(config: ModelConfig) -> dict[str, Any]:
    """Keys of both architectures; those of experts are beside."""
    half, own = turned_dim(config) // 2, gated_deltanet.heads(config)
    return {
        "full_attention_interval": [config.mixer_of(layer) for layer in range(config.layers)].index("attention") + 1,
        "ssm.conv_kernel": config.conv_width,
        "ssm.state_size": own.key_dim,
        "ssm.group_count": own.keys,
        "ssm.time_step_rank": own.values,
        "ssm.inner_size": own.value_features,
        "rope.dimension_sections": [*((half + 2 - k) // 3 for k in range(3)), 0],  # of time, height and width in turn, the same in a text
    }


def read(fields: Fields, stored: Mapping[str, Any], routed: dict[str, Any]) -> dict[str, Any]:
    """Fields of a ModelConfig; routed: those of its experts. Heads are the model's where they are as many, of the same size."""
    every, layers = fields.number("full_attention_interval", 4), min(fields.number("block_count"), len(stored))
    values, keys, size, inner = (fields.number(f"ssm.{name}") for name in ("time_step_rank", "group_count", "state_size", "inner_size"))
    if not every or not values or inner % values:
        raise fields.inexpressible(f"{values} value heads of Gated DeltaNet in {inner} features, attention in every layer of {every}")
    mixer = tuple("gated-deltanet" if (layer + 1) % every else "attention" for layer in range(layers))
    length = fields.number("attention.key_length", fields.number("embedding_length") // max(fields.number("attention.head_count"), 1))
    own = {
        "delta_key_heads": (keys, fields.number("attention.head_count_kv")),
        "delta_value_heads": (values, fields.number("attention.head_count")),
        "delta_key_size": (size, length),
        "delta_value_size": (inner // values, length),
    }
    gates = {"attention_gate": True, "shared_gate": bool(routed.get("shared_experts"))}  # whether they are zero the tensors tell
    more = {"mixer": shortest(mixer), "qk_norm": True, "conv_width": fields.number("ssm.conv_kernel"), **gates}
    return {**more, **routed, **{name: 0 if value == usual else value for name, (value, usual) in own.items()}}


_SAME = ("k_proj", "v_proj", "q_norm", "k_norm")


def _gated_attention(config: ModelConfig, layer: int) -> list[Tie]:
    ours, at, H, K, D = f"layers.{layer}.mixer.", f"blk.{layer}.", config.heads, config.head_dim, config.dim
    query, there, output = f"{ours}q_proj.weight", f"{at}attn_q.weight", (f"{ours}o_proj.weight", f"{at}attn_output.weight")
    rows = [row for row in (*LAYER_ROWS, *OPTIONAL_ROWS["qk_norm"]) if row.ours.split("mixer.")[-1][:6] in _SAME]
    ties = [kept_as(config, row.ours.format(i=layer), row.gguf.format(i=layer)) for row in rows]
    if config.attention_gate:
        return [by_key_head((query, f"{ours}gate_proj.weight"), there, H, (K, K), D), *ties, kept_as(config, *output)]
    return [gated(query, there, H, K, D), *ties, scaled(*output, 2, D, H * K)]


def _joined_in_order(ours: str, names: tuple[str, ...], theirs: str, sizes: tuple[int, ...], order: np.ndarray, dim: int) -> Tie:
    together = joined([f"{ours}{name}_proj.weight" for name in names], theirs, sizes, dim)
    back = np.argsort(order)
    return together._replace(out=lambda a: [together.out(a)[0][order]], back=lambda a: together.back([a[0][back]]))
