"""Which tensors an architecture of llama.cpp has for each of ours: one function per layout, of ties (ties.py).

transformer    most of them: attention, then SwiGLU or experts, all experts of a projection in one tensor
phi3           q, k and v in one tensor, gate and up in one
arwkv7         RWKV-7's time mix
deepseek2      latent attention
granitehybrid  Mamba-2 and attention; A is written as -exp(A_log), whose logarithm comes back but for rounding

llama.cpp turns neighbours (2j, 2j+1) of a head in some architectures, where smedjan, like transformers, turns j with j + K/2. There the
rows of q and k are reordered: row j + h K/2 of a head goes to 2j + h, h = 0, 1. The embedding is cut to the vocabulary: llama.cpp then
chooses among exactly the tokens that smedjan chooses among. A tied head is an `output.weight` that is left out where that may be.
"""

import functools
import itertools
from collections.abc import Sequence

import numpy as np

from convert.names import HEAD_ROW, LAYER_ROWS, MODEL_ROWS, OPTIONAL_ROWS, POST_ROWS, Row
from convert.ties import Tie, joined, kept, reordered, zeros
from smedjan_common.config import ModelConfig
from smedjan_common.model.ffns.experts import width
from smedjan_common.model.mixers import ssm
from smedjan_common.model.mixers.mla import kv_rank, rope_dim
from smedjan_common.model.params import parameter_table

_table = functools.lru_cache(maxsize=4)(parameter_table)


def transformer(config: ModelConfig, turned: bool = False, second: str = "ffn_norm", head: bool = False) -> list[Tie]:
    """turned: neighbours turn there. second: the name of the norm before the feed-forward. head: it is written though it is tied."""
    layers = range(config.layers)
    return whole(config, [[*norms(config, i, second), *_attention(config, i, turned), *feed_forward(config, i)] for i in layers], head)


def phi3(config: ModelConfig) -> list[Tie]:
    kv, F = config.kv_heads * config.head_dim, config.ffn_dim
    ties = []
    for i in range(config.layers):
        qkv = [f"layers.{i}.mixer.{name}_proj.weight" for name in ("q", "k", "v")]
        halves = [f"layers.{i}.ffn.{name}_proj.weight" for name in ("gate", "up")]
        ties += [*norms(config, i), joined(qkv, f"blk.{i}.attn_qkv.weight", [config.inner_dim, kv, kv], config.dim)]
        ties.append(kept_as(config, f"layers.{i}.mixer.o_proj.weight", f"blk.{i}.attn_output.weight"))
        ties.append(joined(halves, f"blk.{i}.ffn_up.weight", [F, F], config.dim))
        ties.append(kept_as(config, f"layers.{i}.ffn.down_proj.weight", f"blk.{i}.ffn_down.weight"))
    return whole(config, [ties])


def granitehybrid(config: ModelConfig) -> list[Tie]:
    ties = []
    for layer in range(config.layers):
        mixer = _mamba(config, layer) if config.mixer_of(layer) == "ssm" else _attention(config, layer, turned=True)
        ties += [*norms(config, layer), *mixer, *feed_forward(config, layer)]
    return whole(config, [ties])


def deepseek2(config: ModelConfig) -> list[Tie]:
    """Features that turn by position are neighbours there; keys and values come of the latent by tensors of three axes, k_b turned over."""
    H, N, P, R, D = config.heads, config.head_dim, rope_dim(config), kv_rank(config), config.dim
    queries = np.concatenate([head * (N + P) + np.concatenate([np.arange(N), N + neighbours(1, P)]) for head in range(H)])
    latents, ties = np.concatenate([np.arange(R), R + neighbours(1, P)]), []

    def out(arrays):
        both = arrays[0].reshape(H, 2 * N, R)
        return [both[:, :N].swapaxes(1, 2), both[:, N:]]

    def back(arrays):
        return [np.concatenate([arrays[0].swapaxes(1, 2), arrays[1]], axis=1).reshape(2 * H * N, R)]

    for i in range(config.layers):
        ours, at = f"layers.{i}.mixer.", f"blk.{i}."
        if config.mla_q_rank:
            ties += [
                kept_as(config, f"{ours}q_a_{name}.weight", f"{at}attn_q_a{end}.weight") for name, end in (("proj", ""), ("norm", "_norm"))
            ]
            ties.append(reordered(f"{ours}q_b_proj.weight", f"{at}attn_q_b.weight", queries, config.mla_q_rank))
        else:
            ties.append(reordered(f"{ours}q_proj.weight", f"{at}attn_q.weight", queries, D))
        ties.append(reordered(f"{ours}kv_a_proj.weight", f"{at}attn_kv_a_mqa.weight", latents, D))
        ties.append(kept_as(config, f"{ours}kv_a_norm.weight", f"{at}attn_kv_a_norm.weight"))
        ties.append(Tie((f"{ours}kv_b_proj.weight",), (f"{at}attn_k_b.weight", f"{at}attn_v_b.weight"), ((H, R, N), (H, N, R)), out, back))
        ties.append(kept_as(config, f"{ours}o_proj.weight", f"{at}attn_output.weight"))
        ties += [*norms(config, i), *feed_forward(config, i)]
    return whole(config, [ties], head=True)


def arwkv7(config: ModelConfig) -> list[Tie]:
    """RWKV-7's time mix with SwiGLU. The first layer has parts of a mix of values there that nothing reads."""
    D, ties = config.dim, []
    ranks = {name: _table(config)[f"layers.0.mixer.{name}1.weight"].shape[0] for name in "wag"}
    shifts = ("r", "w", "k", "v", "a", "g")
    for i in range(config.layers):
        ours, at = f"layers.{i}.mixer.", f"blk.{i}.time_mix_"
        lerps = tuple(f"{ours}x_{name}" for name in shifts)
        ties += norms(config, i)
        ties.append(
            Tie(
                lerps,
                (f"{at}lerp_fused.weight",),
                ((6, 1, 1, D),),
                lambda a: [np.stack(a).reshape(6, 1, 1, D)],
                lambda a: list(a[0].reshape(6, D)),
            )
        )
        for name in ("w", "a", "v", "g"):
            parts = [*([f"{name}0"] if name != "g" else []), f"{name}1", f"{name}2"]
            if name == "v" and i == 0:
                sizes = {"v0": (D,), "v1": (ranks["a"], D), "v2": (D, ranks["a"])}
                ties += [zeros(f"{at}{part}.weight", *sizes[part])._replace(checked=False) for part in parts]
            else:
                ties += [
                    kept_as(config, f"{ours}{part}" + ("" if part.endswith("0") else ".weight"), f"{at}{part}.weight") for part in parts
                ]
        ties += [kept_as(config, f"{ours}{name}", f"{at}{name}.weight") for name in ("k_k", "k_a")]
        heads = _table(config)[f"{ours}r_k"].shape
        ties.append(
            Tie((f"{ours}r_k",), (f"{at}r_k.weight",), ((D,),), lambda a: [a[0].reshape(-1)], lambda a, heads=heads: [a[0].reshape(heads)])
        )
        more = {"r_proj": "receptance", "k_proj": "key", "v_proj": "value", "o_proj": "output", "ln_x": "ln"}
        ties += [kept_as(config, f"{ours}{name}.weight", f"{at}{theirs}.weight") for name, theirs in more.items()]
        ties += [kept_as(config, f"{ours}ln_x.bias", f"{at}ln.bias"), *feed_forward(config, i)]
    return whole(config, [ties], head=True)


# parts


def kept_as(config: ModelConfig, ours: str, theirs: str) -> Tie:
    """The tensor itself."""
    return kept(ours, theirs, _table(config)[ours].shape)


def _row(config: ModelConfig, row: Row, layer: int = 0) -> Tie:
    return kept_as(config, row.ours.format(i=layer), row.gguf.format(i=layer))


def whole(config: ModelConfig, layers: Sequence[list[Tie]], head: bool = False) -> list[Tie]:
    """The layers between embedding, final norm and head, in the order of the forward pass."""
    embed, norm = MODEL_ROWS
    ties = [_vocabulary(config, embed.ours, embed.gguf), *itertools.chain(*layers), _row(config, norm)]
    if config.tied_head:
        return [*ties, _vocabulary(config, embed.ours, HEAD_ROW.gguf)] if head else ties
    return [*ties, _vocabulary(config, HEAD_ROW.ours, HEAD_ROW.gguf)]


def _vocabulary(config: ModelConfig, ours: str, theirs: str) -> Tie:
    """A table with a row for each token: cut to them there, padded here."""
    rows, missing = config.vocab_size, config.padded_vocab_size - config.vocab_size
    return Tie(
        (ours,),
        (theirs,),
        ((rows, config.dim),),
        lambda arrays: [arrays[0][:rows]],
        lambda arrays: [np.pad(arrays[0], ((0, missing), (0, 0)))],
        by_rows=True,
    )


def norms(config: ModelConfig, layer: int, second: str = "ffn_norm") -> list[Tie]:
    """Those of the block; second: what the one before the feed-forward is called."""
    rows = POST_ROWS if config.norms == "post" else [row for row in LAYER_ROWS if "_norm." in row.ours]
    return [_row(config, row._replace(gguf=row.gguf.replace("ffn_norm", second)), layer) for row in rows]


def _attention(config: ModelConfig, layer: int, turned: bool) -> list[Tie]:
    rows = [row for row in LAYER_ROWS if ".mixer." in row.ours]
    rows += [row for name, more in OPTIONAL_ROWS.items() if getattr(config, name) for row in more]
    ties = []
    for row in rows:
        ours, theirs = row.ours.format(i=layer), row.gguf.format(i=layer)
        heads = {"q_proj": config.heads, "k_proj": config.kv_heads}.get(ours.split(".")[-2], 0)
        shape = _table(config)[ours].shape
        ties.append(
            reordered(ours, theirs, neighbours(heads, config.head_dim), *shape[1:]) if turned and heads else kept(ours, theirs, shape)
        )
    return ties


def neighbours(heads: int, size: int) -> np.ndarray:
    """For each row of q or k there, which row of ours it is."""
    within = np.arange(size).reshape(2, size // 2).T.reshape(-1)
    return (np.arange(heads)[:, None] * size + within).reshape(-1)


def feed_forward(config: ModelConfig, layer: int) -> list[Tie]:
    """SwiGLU, or experts with what comes with them."""
    if config.ffn_of(layer) != "experts":
        return [_row(config, row, layer) for row in LAYER_ROWS if ".ffn." in row.ours]
    ours, at = f"layers.{layer}.ffn.", f"blk.{layer}."
    ties = [kept_as(config, f"{ours}router.weight", f"{at}ffn_gate_inp.weight")]
    if config.router == "bias":
        ties.append(kept_as(config, f"{ours}router.bias", f"{at}exp_probs_b.bias"))
    for name in ("gate", "up", "down"):
        ties.append(kept_as(config, f"{ours}{name}_proj.weight", f"{at}ffn_{name}_exps.weight"))
        if config.shared_experts:
            ties.append(kept_as(config, f"{ours}shared.{name}_proj.weight", f"{at}ffn_{name}_shexp.weight"))
        elif config.router == "bias" or "mla" in config.mixer:  # llama.cpp does not do without one
            shape = (width(config), config.dim)
            ties.append(zeros(f"{at}ffn_{name}_shexp.weight", *(shape if name != "down" else shape[::-1])))
    return ties


def _mamba(config: ModelConfig, layer: int) -> list[Tie]:
    ours, at, heads, groups = f"layers.{layer}.mixer.", f"blk.{layer}.", ssm.heads(config), config.ssm_groups
    inner = heads * config.ssm_head_dim
    return [
        kept_as(config, f"{ours}in_proj.weight", f"{at}ssm_in.weight"),
        kept_as(config, f"{ours}conv.weight", f"{at}ssm_conv1d.weight"),
        kept_as(config, f"{ours}conv_bias", f"{at}ssm_conv1d.bias"),
        kept_as(config, f"{ours}dt_bias", f"{at}ssm_dt.bias"),
        decay(f"{ours}A_log", f"{at}ssm_a", heads, 1),
        Tie((f"{ours}D",), (f"{at}ssm_d",), ((heads, 1),), lambda a: [a[0].reshape(heads, 1)], lambda a: [a[0].reshape(heads)]),
        Tie(
            (f"{ours}norm.weight",),
            (f"{at}ssm_norm.weight",),
            ((groups, inner // groups),),
            lambda a: [a[0].reshape(groups, -1)],
            lambda a: [a[0].reshape(-1)],
        ),
        kept_as(config, f"{ours}out_proj.weight", f"{at}ssm_out.weight"),
    ]


def decay(ours: str, theirs: str, *shape: int, order: np.ndarray | None = None) -> Tie:
    """A_log as A = -exp(A_log), theirs[j] of ours[order[j]]."""
    order = np.arange(shape[0]) if order is None else order
    back = np.argsort(order)
    return Tie(
        (ours,),
        (theirs,),
        (shape,),
        lambda arrays: [-np.exp(arrays[0][order]).reshape(shape)],
        lambda arrays: [np.log(np.maximum(-arrays[0], 1e-30)).reshape(-1)[back]],
    )
