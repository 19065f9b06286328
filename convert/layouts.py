"""Which tensors an architecture of transformers has for each of ours: one function per layout, of ties (ties.py).

llama             Llama, Qwen2, Qwen3, Mistral, and the attention and feed-forward of most others
phi3              q, k and v in one tensor, gate and up in one
mixtral           experts as block_sparse_moe.experts.E.w1, w3, w2
qwen3_moe         experts as mlp.experts.E.gate_proj, …; dense layers between
glm4_moe          the same with the bias router and shared experts, after a prefix of dense layers
granitemoehybrid  Mamba-2 and attention; gate and up in one tensor
deepseek_v3       latent attention; features that turn by position are neighbours there, as a rule
qwen3_next        Gated DeltaNet and attention; norms are added to one; there are gates always (0 is a half: what follows is doubled)
qwen3_5           the same, its input projections apart
qwen3_5_moe       the same with experts, gate and up of all of them in one tensor
"""

import functools
import re

import numpy as np

from convert.names import HEAD_ROW, LAYER_ROWS, MODEL_ROWS, OPTIONAL_ROWS, POST_ROWS, Row
from convert.ties import Tie, by_expert, by_key_head, gated, joined, kept, reordered, same, scaled, shifted, zeros
from smedjan_common.config import ModelConfig
from smedjan_common.model.ffns.experts import width
from smedjan_common.model.mixers import gated_deltanet, ssm
from smedjan_common.model.mixers.mla import kv_rank, rope_dim
from smedjan_common.model.params import parameter_table

PREFIX = "model."
NESTED = "model.language_model."  # of a language model inside a larger one
_table = functools.lru_cache(maxsize=4)(parameter_table)


def llama(config: ModelConfig) -> list[Tie]:
    """Every tensor by itself."""
    return [*_ends(config), *(tie for layer in range(config.layers) for tie in (*_attention(config, layer), *_swiglu(config, layer)))]


def phi3(config: ModelConfig) -> list[Tie]:
    kv, F = config.kv_heads * config.head_dim, config.ffn_dim
    ties = _ends(config)
    for i in range(config.layers):
        at, ours = f"model.layers.{i}", f"layers.{i}."
        qkv = [f"{ours}mixer.{name}_proj.weight" for name in ("q", "k", "v")]
        ties += [*_norms(config, i), joined(qkv, f"{at}.self_attn.qkv_proj.weight", [config.inner_dim, kv, kv], config.dim)]
        ties.append(_as_is(config, f"{ours}mixer.o_proj.weight", f"{at}.self_attn.o_proj.weight"))
        halves = [f"{ours}ffn.{name}_proj.weight" for name in ("gate", "up")]
        ties.append(joined(halves, f"{at}.mlp.gate_up_proj.weight", [F, F], config.dim))
        ties.append(_as_is(config, f"{ours}ffn.down_proj.weight", f"{at}.mlp.down_proj.weight"))
    return ties


def mixtral(config: ModelConfig) -> list[Tie]:
    experts = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    ties = _ends(config)
    for i in range(config.layers):
        ties += _attention(config, i)
        ties += _experts(config, i, f"model.layers.{i}.block_sparse_moe", "gate.weight", experts)
    return ties


def qwen3_moe(config: ModelConfig) -> list[Tie]:
    ties = _ends(config)
    for i in range(config.layers):
        ties += _attention(config, i)
        ties += _experts(config, i, f"model.layers.{i}.mlp") if config.ffn_of(i) == "experts" else _swiglu(config, i)
    return ties


def glm4_moe(config: ModelConfig) -> list[Tie]:
    return [*qwen3_moe(config), *_written_head(config)]


_LATENT_EPS = 1e-6  # of the norms of latents, whatever config.json says of the others


def deepseek_v3(config: ModelConfig, halves: bool = False) -> list[Tie]:
    """halves: features that turn together are half a head apart, as here (rope_interleave false).

    Latents before their norms are larger here where the norms' eps is: c x / sqrt(mean (c x)^2 + c^2 eps) is the same for any c."""
    H, N, P, R = config.heads, config.head_dim, rope_dim(config), kv_rank(config)
    turned = np.arange(P) if halves else _neighbours(P)
    queries = np.concatenate([head * (N + P) + np.concatenate([np.arange(N), N + turned]) for head in range(H)])
    latents, ties = np.concatenate([np.arange(R), R + turned]), _ends(config)
    larger = (config.norm_eps / _LATENT_EPS) ** 0.5
    normed = np.concatenate([np.full((R, 1), larger, np.float32), np.ones((P, 1), np.float32)])
    for i in range(config.layers):
        ours, theirs = f"layers.{i}.mixer.", f"model.layers.{i}.self_attn."
        if config.mla_q_rank:
            ties.append(scaled(f"{ours}q_a_proj.weight", f"{theirs}q_a_proj.weight", 1 / larger, config.mla_q_rank, config.dim))
            ties.append(_as_is(config, f"{ours}q_a_norm.weight", f"{theirs}q_a_layernorm.weight"))
            ties.append(reordered(f"{ours}q_b_proj.weight", f"{theirs}q_b_proj.weight", queries, config.mla_q_rank))
        else:
            ties.append(reordered(f"{ours}q_proj.weight", f"{theirs}q_proj.weight", queries, config.dim))
        ties.append(reordered(f"{ours}kv_a_proj.weight", f"{theirs}kv_a_proj_with_mqa.weight", latents, config.dim, by=1 / normed))
        ties.append(_as_is(config, f"{ours}kv_a_norm.weight", f"{theirs}kv_a_layernorm.weight"))
        ties += [_as_is(config, f"{ours}{name}.weight", f"{theirs}{name}.weight") for name in ("kv_b_proj", "o_proj")]
        ties += _norms(config, i)
        at = f"model.layers.{i}.mlp"
        ties += _experts(config, i, at, filled=True) if config.ffn_of(i) == "experts" else _swiglu(config, i)
    return [*ties, *_written_head(config)]


def granitemoehybrid(config: ModelConfig) -> list[Tie]:
    ties = _ends(config)
    for i in range(config.layers):
        at = f"model.layers.{i}"
        ties += _mamba(config, i) if config.mixer_of(i) == "ssm" else _attention(config, i)
        if config.ffn_of(i) != "experts":
            ties += _gate_and_up(config, f"layers.{i}.ffn.", f"{at}.shared_mlp", config.ffn_dim)
            continue
        ours, E, F, D = f"layers.{i}.ffn.", config.experts, width(config), config.dim
        ties.append(_as_is(config, f"{ours}router.weight", f"{at}.block_sparse_moe.router.layer.weight"))
        names = [f"{ours}{name}_proj.weight" for name in ("gate", "up")]
        ties.append(joined(names, f"{at}.block_sparse_moe.input_linear.weight", [F, F], E, D, axis=1))
        ties.append(_as_is(config, f"{ours}down_proj.weight", f"{at}.block_sparse_moe.output_linear.weight"))
        ties += _gate_and_up(config, f"{ours}shared.", f"{at}.shared_mlp", config.shared_experts * F)
    return ties


def qwen3_next(config: ModelConfig) -> list[Tie]:
    """Queries, keys, values and gates of a key head stand together there, and so do b and a."""
    G, H, K, V = gated_deltanet.heads(config)
    R, ties = H // G, _delta_ends(config)
    for i in range(config.layers):
        if config.mixer_of(i) == "attention":
            ties += _gated_attention(config, i)
        else:
            ours, theirs = f"layers.{i}.mixer.", f"model.layers.{i}.linear_attn."
            names = tuple(f"{ours}{name}_proj.weight" for name in ("q", "k", "v", "z"))
            ties.append(by_key_head(names, f"{theirs}in_proj_qkvz.weight", G, (K, K, R * V, R * V), config.dim))
            ties.append(by_key_head((f"{ours}b_proj.weight", f"{ours}a_proj.weight"), f"{theirs}in_proj_ba.weight", G, (R, R), config.dim))
            ties += _delta(config, i)
        ties += _delta_feed_forward(config, i)
    return ties


def qwen3_5(config: ModelConfig) -> list[Tie]:
    own, ties = gated_deltanet.heads(config), _delta_ends(config)
    sizes = [own.key_features, own.key_features, own.value_features]
    for i in range(config.layers):
        if config.mixer_of(i) == "attention":
            ties += _gated_attention(config, i)
        else:
            ours, theirs = f"layers.{i}.mixer.", f"model.layers.{i}.linear_attn."
            names = [f"{ours}{name}_proj.weight" for name in ("q", "k", "v")]
            ties.append(joined(names, f"{theirs}in_proj_qkv.weight", sizes, config.dim))
            ties += [_as_is(config, f"{ours}{name}_proj.weight", f"{theirs}in_proj_{name}.weight") for name in ("z", "a", "b")]
            ties += _delta(config, i)
        ties += _delta_feed_forward(config, i)
    return [tie._replace(theirs=tuple(name.replace(PREFIX, NESTED, 1) for name in tie.theirs)) for tie in ties]


def qwen3_5_moe(config: ModelConfig) -> list[Tie]:
    """What `qwen3_5` gives, with the experts of a projection in one tensor."""
    apart = re.compile(r"layers\.\d+\.ffn\.(gate|up|down)_proj\.weight")
    ties = [tie for tie in qwen3_5(config) if not (tie.ours and apart.fullmatch(tie.ours[0]))]
    E, F, D = config.experts, width(config), config.dim
    for i in range(config.layers):
        ours, at = f"layers.{i}.ffn.", f"{NESTED}layers.{i}.mlp.experts"
        ties.append(joined([f"{ours}gate_proj.weight", f"{ours}up_proj.weight"], f"{at}.gate_up_proj", [F, F], E, D, axis=1))
        ties.append(_as_is(config, f"{ours}down_proj.weight", f"{at}.down_proj"))
    return ties


# parts


def _as_is(config: ModelConfig, ours: str, theirs: str) -> Tie:
    return kept(ours, theirs, _table(config)[ours].shape)


def _row(config: ModelConfig, row: Row, layer: int = 0) -> Tie:
    return _as_is(config, row.ours.format(i=layer), row.hf.format(i=layer))


def _ends(config: ModelConfig) -> list[Tie]:
    return [_row(config, row) for row in (*MODEL_ROWS, *(() if config.tied_head else (HEAD_ROW,)))]


def _written_head(config: ModelConfig) -> list[Tie]:
    """Programs that read no tied head of this architecture get it written out."""
    return [_as_is(config, "embed.weight", HEAD_ROW.hf)] if config.tied_head else []


def _norms(config: ModelConfig, layer: int) -> list[Tie]:
    rows = POST_ROWS if config.norms == "post" else [row for row in LAYER_ROWS if "_norm." in row.ours]
    return [_row(config, row, layer) for row in rows]


def _attention(config: ModelConfig, layer: int) -> list[Tie]:
    """The norms of the block among them."""
    rows = [row for row in LAYER_ROWS if ".mixer." in row.ours]
    rows += [row for name, more in OPTIONAL_ROWS.items() if getattr(config, name) for row in more]
    return [*_norms(config, layer), *(_row(config, row, layer) for row in rows)]


def _swiglu(config: ModelConfig, layer: int) -> list[Tie]:
    return [_row(config, row, layer) for row in LAYER_ROWS if ".ffn." in row.ours]


def _experts(
    config: ModelConfig,
    layer: int,
    at: str,
    router: str = "gate.weight",
    names: dict[str, str] | None = None,
    shared: str = "shared_experts",
    filled: bool = False,
) -> list[Tie]:
    """filled: they need shared ones, which are written with weights of zero where there are none."""
    ours, E, F, D = f"layers.{layer}.ffn.", config.experts, width(config), config.dim
    ties = [_as_is(config, f"{ours}router.weight", f"{at}.{router}")]
    if config.router == "bias":
        ties.append(_as_is(config, f"{ours}router.bias", f"{at}.gate.e_score_correction_bias"))
    for name, shape in (("gate_proj", (F, D)), ("up_proj", (F, D)), ("down_proj", (D, F))):
        theirs = (names or {}).get(name, name)
        ties.append(by_expert(f"{ours}{name}.weight", f"{at}.experts.{{e}}.{theirs}.weight", E, *shape))
        if config.shared_experts:
            ties.append(_as_is(config, f"{ours}shared.{name}.weight", f"{at}.{shared}.{name}.weight"))
        elif filled or config.router == "bias":
            ties.append(zeros(f"{at}.{shared}.{name}.weight", *shape))
    return ties


def _gate_and_up(config: ModelConfig, ours: str, at: str, hidden: int) -> list[Tie]:
    names = [f"{ours}{name}_proj.weight" for name in ("gate", "up")]
    return [
        joined(names, f"{at}.input_linear.weight", [hidden, hidden], config.dim),
        _as_is(config, f"{ours}down_proj.weight", f"{at}.output_linear.weight"),
    ]


def _mamba(config: ModelConfig, layer: int) -> list[Tie]:
    ours, theirs = f"layers.{layer}.mixer.", f"model.layers.{layer}.mamba."
    names = {"in_proj.weight": "in_proj.weight", "conv_bias": "conv1d.bias", "out_proj.weight": "out_proj.weight"}
    names |= {name: name for name in ("A_log", "dt_bias", "D", "norm.weight")}
    taps = same(f"{ours}conv.weight", f"{theirs}conv1d.weight", (ssm.convolved_dim(config), 1, config.conv_width))
    return [*_norms(config, layer), taps, *(_as_is(config, f"{ours}{name}", f"{theirs}{other}") for name, other in names.items())]


def _neighbours(size: int) -> np.ndarray:
    """Halves of a head as neighbours: place 2 j + h has feature j + h size / 2."""
    return np.arange(size).reshape(2, size // 2).T.reshape(-1)


def _delta_ends(config: ModelConfig) -> list[Tie]:
    embed, norm = MODEL_ROWS
    head = [] if config.tied_head else [_row(config, HEAD_ROW)]
    return [_row(config, embed), shifted(norm.ours, norm.hf, -1, config.dim), *head]


def _delta(config: ModelConfig, layer: int) -> list[Tie]:
    ours, theirs = f"layers.{layer}.mixer.", f"model.layers.{layer}.linear_attn."
    features = gated_deltanet.heads(config).convolved
    return [
        *_shifted_norms(config, layer),
        same(f"{ours}conv.weight", f"{theirs}conv1d.weight", (features, 1, config.conv_width)),
        *(_as_is(config, f"{ours}{name}", f"{theirs}{name}") for name in ("A_log", "dt_bias", "norm.weight")),
        _as_is(config, f"{ours}o_proj.weight", f"{theirs}out_proj.weight"),
    ]


def _shifted_norms(config: ModelConfig, layer: int) -> list[Tie]:
    rows = [row for row in LAYER_ROWS if "_norm." in row.ours]
    return [shifted(row.ours.format(i=layer), row.hf.format(i=layer), -1, config.dim) for row in rows]


def _gated_attention(config: ModelConfig, layer: int) -> list[Tie]:
    """A gate stands with its queries there, head by head."""
    ours, theirs, H, K, D = f"layers.{layer}.mixer.", f"model.layers.{layer}.self_attn.", config.heads, config.head_dim, config.dim
    ties = [*_shifted_norms(config, layer), *(shifted(f"{ours}{name}_norm.weight", f"{theirs}{name}_norm.weight", -1, K) for name in "qk")]
    same = [f"{name}_proj.weight" for name in "kv"]
    for part, *extents in (("weight", D), *([("bias",)] if config.qkv_bias else [])):
        query, gate, there = f"{ours}q_proj.{part}", f"{ours}gate_proj.{part}", f"{theirs}q_proj.{part}"
        if config.attention_gate:
            ties.append(by_key_head((query, gate), there, H, (K, K), *extents))
        else:
            ties.append(gated(query, there, H, K, *extents))
    same += [f"{name}_proj.bias" for name in "kv" if config.qkv_bias] + ["o_proj.bias"] * config.o_bias
    if config.attention_gate:
        same.append("o_proj.weight")
    else:
        ties.append(scaled(f"{ours}o_proj.weight", f"{theirs}o_proj.weight", 2, D, H * K))
    return [*ties, *(_as_is(config, f"{ours}{name}", f"{theirs}{name}") for name in same)]


def _delta_feed_forward(config: ModelConfig, layer: int) -> list[Tie]:
    if config.ffn_of(layer) != "experts":
        return _swiglu(config, layer)
    at, D = f"model.layers.{layer}.mlp", config.dim
    ties = _experts(config, layer, at, shared="shared_expert")
    if config.shared_gate:
        return [*ties, _as_is(config, f"layers.{layer}.ffn.shared_gate.weight", f"{at}.shared_expert_gate.weight")]
    down = f"layers.{layer}.ffn.shared.down_proj.weight"
    ties = [tie for tie in ties if tie.ours != (down,)]
    ties.append(scaled(down, f"{at}.shared_expert.down_proj.weight", 2, D, config.shared_experts * width(config)))
    return [*ties, zeros(f"{at}.shared_expert_gate.weight", 1, D)]
