"""Tensors of Gated DeltaNet with attention in GGUF: qwen35 and qwen3next.

Norms are written as they are here, not less one. Attention has an output gate there (0, so a half: o_proj is doubled), and so have shared
experts. In qwen35 value head j of H reads key head j mod Hk, here j // (H / Hk): value heads are in another order there.
"""

import numpy as np

from convert.gguf_layouts import decay, feed_forward, kept_as, norms, whole
from convert.names import LAYER_ROWS, OPTIONAL_ROWS
from convert.ties import Tie, by_key_head, gated, joined, reordered, scaled, zeros
from smedjan_common.config import ModelConfig
from smedjan_common.model.ffns.experts import width

_SECOND = "post_attention_norm"


def qwen35(config: ModelConfig) -> list[Tie]:
    G, R, K, D = config.kv_heads, config.heads // config.kv_heads, config.head_dim, config.dim
    heads = np.arange(G * R).reshape(G, R).T.reshape(-1)  # theirs -> ours
    rows = (heads[:, None] * K + np.arange(K)).reshape(-1)
    ties = []
    for i in range(config.layers):
        ours, at = f"layers.{i}.mixer.", f"blk.{i}."
        ties += norms(config, i, _SECOND)
        if config.mixer_of(i) == "attention":
            ties += _gated_attention(config, i)
        else:
            values = 2 * G * K  # where they begin among what is convolved
            convolved = np.concatenate([np.arange(values), values + rows])
            ties.append(_joined_in_order(ours, ("q", "k", "v"), f"{at}attn_qkv.weight", (G * K, G * K, G * R * K), convolved, D))
            ties.append(reordered(f"{ours}z_proj.weight", f"{at}attn_gate.weight", rows, D))
            ties.append(reordered(f"{ours}b_proj.weight", f"{at}ssm_beta.weight", heads, D))
            ties.append(reordered(f"{ours}a_proj.weight", f"{at}ssm_alpha.weight", heads, D))
            ties.append(reordered(f"{ours}conv.weight", f"{at}ssm_conv1d.weight", convolved, config.conv_width))
            ties.append(reordered(f"{ours}dt_bias", f"{at}ssm_dt.bias", heads))
            ties.append(decay(f"{ours}A_log", f"{at}ssm_a", G * R, order=heads))
            ties.append(kept_as(config, f"{ours}norm.weight", f"{at}ssm_norm.weight"))
            ties.append(reordered(f"{ours}o_proj.weight", f"{at}ssm_out.weight", rows, D, axis=1))
        ties += feed_forward(config, i)
    return whole(config, [ties])


def qwen3next(config: ModelConfig) -> list[Tie]:
    G, R, K, D = config.kv_heads, config.heads // config.kv_heads, config.head_dim, config.dim
    ties = []
    for i in range(config.layers):
        ours, at = f"layers.{i}.mixer.", f"blk.{i}."
        ties += norms(config, i, _SECOND)
        if config.mixer_of(i) == "attention":
            ties += _gated_attention(config, i)
        else:
            names = [f"{ours}{name}_proj.weight" for name in ("q", "k", "v")]
            ties.append(joined(names, f"{at}attn_qkv.weight", [G * K, G * K, G * R * K], D))
            ties.append(by_key_head((f"{ours}b_proj.weight", f"{ours}a_proj.weight"), f"{at}ssm_ba.weight", G, (R, R), D))
            more = {"z_proj.weight": "attn_gate.weight", "conv.weight": "ssm_conv1d.weight", "dt_bias": "ssm_dt.bias"}
            more |= {"norm.weight": "ssm_norm.weight", "o_proj.weight": "ssm_out.weight"}
            ties += [kept_as(config, f"{ours}{name}", f"{at}{theirs}") for name, theirs in more.items()]
            ties.append(decay(f"{ours}A_log", f"{at}ssm_a", G * R))
        down = f"layers.{i}.ffn.shared.down_proj.weight"
        ties += [tie for tie in feed_forward(config, i) if tie.ours != (down,)]
        ties.append(scaled(down, f"{at}ffn_down_shexp.weight", 2, D, config.shared_experts * width(config)))
        ties.append(zeros(f"{at}ffn_gate_inp_shexp.weight", D))
    return whole(config, [ties])


_SAME = ("k_proj", "v_proj", "q_norm", "k_norm")


def _gated_attention(config: ModelConfig, layer: int) -> list[Tie]:
    ours, at, K, D = f"layers.{layer}.mixer.", f"blk.{layer}.", config.head_dim, config.dim

    same = [row for row in (*LAYER_ROWS, *OPTIONAL_ROWS["qk_norm"]) if row.ours.split("mixer.")[-1][:6] in _SAME]
    return [
        gated(f"{ours}q_proj.weight", f"{at}attn_q.weight", config.heads, K, D),
        *(kept_as(config, row.ours.format(i=layer), row.gguf.format(i=layer)) for row in same),
        scaled(f"{ours}o_proj.weight", f"{at}attn_output.weight", 2, D, config.heads * K),
    ]


def _joined_in_order(ours: str, names: tuple[str, ...], theirs: str, sizes: tuple[int, ...], order: np.ndarray, dim: int) -> Tie:
    together = joined([f"{ours}{name}_proj.weight" for name in names], theirs, sizes, dim)
    back = np.argsort(order)
    return together._replace(out=lambda a: [together.out(a)[0][order]], back=lambda a: together.back([a[0][back]]))
