"""Which tensors an architecture of llama.cpp has for each of ours: one function per layout, of ties (ties.py).

transformer    most of them: attention, then SwiGLU or experts, all experts of a projection in one tensor
phi3           q, k and v in one tensor, gate and up in one
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
from smedjan_common.model.params import parameter_table

_table = functools.lru_cache(maxsize=4)(parameter_table)


def transformer(config: ModelConfig, turned: bool = False, second: str = "ffn_norm", head: bool = False) -> list[Tie]:
    """turned: neighbours turn there. second: the name of the norm before the feed-forward. head: it is written though it is tied."""
    layers = range(config.layers)
    return _whole(config, [[*_norms(config, i, second), *_attention(config, i, turned), *_feed_forward(config, i)] for i in layers], head)


def phi3(config: ModelConfig) -> list[Tie]:
    kv, F = config.kv_heads * config.head_dim, config.ffn_dim
    ties = []
    for i in range(config.layers):
        qkv = [f"layers.{i}.mixer.{name}_proj.weight" for name in ("q", "k", "v")]
        halves = [f"layers.{i}.ffn.{name}_proj.weight" for name in ("gate", "up")]
        ties += [*_norms(config, i), joined(qkv, f"blk.{i}.attn_qkv.weight", [config.inner_dim, kv, kv], config.dim)]
        ties.append(_kept(config, f"layers.{i}.mixer.o_proj.weight", f"blk.{i}.attn_output.weight"))
        ties.append(joined(halves, f"blk.{i}.ffn_up.weight", [F, F], config.dim))
        ties.append(_kept(config, f"layers.{i}.ffn.down_proj.weight", f"blk.{i}.ffn_down.weight"))
    return _whole(config, [ties])


def granitehybrid(config: ModelConfig) -> list[Tie]:
    ties = []
    for layer in range(config.layers):
        mixer = _mamba(config, layer) if config.mixer_of(layer) == "ssm" else _attention(config, layer, turned=True)
        ties += [*_norms(config, layer), *mixer, *_feed_forward(config, layer)]
    return _whole(config, [ties])


# parts


def _kept(config: ModelConfig, ours: str, theirs: str) -> Tie:
    return kept(ours, theirs, _table(config)[ours].shape)


def _row(config: ModelConfig, row: Row, layer: int = 0) -> Tie:
    return _kept(config, row.ours.format(i=layer), row.gguf.format(i=layer))


def _whole(config: ModelConfig, layers: Sequence[list[Tie]], head: bool = False) -> list[Tie]:
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


def _norms(config: ModelConfig, layer: int, second: str = "ffn_norm") -> list[Tie]:
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


def _feed_forward(config: ModelConfig, layer: int) -> list[Tie]:
    if config.ffn_of(layer) != "experts":
        return [_row(config, row, layer) for row in LAYER_ROWS if ".ffn." in row.ours]
    ours, at = f"layers.{layer}.ffn.", f"blk.{layer}."
    ties = [_kept(config, f"{ours}router.weight", f"{at}ffn_gate_inp.weight")]
    if config.router == "bias":
        ties.append(_kept(config, f"{ours}router.bias", f"{at}exp_probs_b.bias"))
    for name in ("gate", "up", "down"):
        ties.append(_kept(config, f"{ours}{name}_proj.weight", f"{at}ffn_{name}_exps.weight"))
        if config.shared_experts:
            ties.append(_kept(config, f"{ours}shared.{name}_proj.weight", f"{at}ffn_{name}_shexp.weight"))
        elif config.router == "bias":  # llama.cpp does not do without one
            shape = (width(config), config.dim)
            ties.append(zeros(f"{at}ffn_{name}_shexp.weight", *(shape if name != "down" else shape[::-1])))
    return ties


def _mamba(config: ModelConfig, layer: int) -> list[Tie]:
    ours, at, heads, groups = f"layers.{layer}.mixer.", f"blk.{layer}.", ssm.heads(config), config.ssm_groups
    inner = heads * config.ssm_head_dim
    return [
        _kept(config, f"{ours}in_proj.weight", f"{at}ssm_in.weight"),
        _kept(config, f"{ours}conv.weight", f"{at}ssm_conv1d.weight"),
        _kept(config, f"{ours}conv_bias", f"{at}ssm_conv1d.bias"),
        _kept(config, f"{ours}dt_bias", f"{at}ssm_dt.bias"),
        _decay(f"{ours}A_log", f"{at}ssm_a", heads, 1),
        Tie((f"{ours}D",), (f"{at}ssm_d",), ((heads, 1),), lambda a: [a[0].reshape(heads, 1)], lambda a: [a[0].reshape(heads)]),
        Tie(
            (f"{ours}norm.weight",),
            (f"{at}ssm_norm.weight",),
            ((groups, inner // groups),),
            lambda a: [a[0].reshape(groups, -1)],
            lambda a: [a[0].reshape(-1)],
        ),
        _kept(config, f"{ours}out_proj.weight", f"{at}ssm_out.weight"),
    ]


def _decay(ours: str, theirs: str, *shape: int) -> Tie:
    """A_log as A = -exp(A_log)."""
    return Tie(
        (ours,), (theirs,), (shape,), lambda a: [-np.exp(a[0]).reshape(shape)], lambda a: [np.log(np.maximum(-a[0], 1e-30)).reshape(-1)]
    )
