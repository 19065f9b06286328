"""The architectures of llama.cpp that hold a model of smedjan: FORMS, a row each, and which of them a family of families.py goes to.

| architecture | families | what llama.cpp does not do there |
|---|---|---|
| llama | llama, mistral, ministral, mixtral | windows |
| qwen2, qwen3, phi3 | the same | windows |
| qwen3moe | qwen3_moe | dense layers between |
| smollm3 | smollm3 | windows; other layers that do not turn than every fourth |
| olmo2 | olmo2, olmo3 | biases; other layers that see all than every fourth |
| glm4moe | glm4_moe | |
| olmoe | olmoe | weights of experts that add up to 1; biases; shared keys and values |
| arwkv7 | none: rwkv with SwiGLU | |
| deepseek2 | deepseek_v3, deepseek_v2 | queries that are not compressed; groups with the softmax router; two factors of YaRN |
| qwen35, qwen3next | qwen3_5, qwen3_next | attention elsewhere than in every so many layers; biases; dense layers between; K other than V |
| granite, granitemoe, granitehybrid | granite, granitemoehybrid | |
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from convert import gguf_delta, gguf_layouts
from convert.families import chosen, dense_prefix, families_of
from convert.gguf_fields import Fields
from convert.hf_values import shortest
from convert.ties import Tie
from smedjan_common.config import ModelConfig
from smedjan_common.errors import ConfigError
from smedjan_common.model.ffns.experts import limited, width
from smedjan_common.model.mixers import ssm
from smedjan_common.model.mixers.mla import kv_rank, rope_dim
from smedjan_common.model.params import parameter_table
from smedjan_common.model.rope import attention_factor, plain_factor

Stored = Mapping[str, Any]
_SOFTMAX, _SIGMOID = 1, 2  # llama.cpp's numbers of expert_gating_func
_SCALED = ("glm4moe", "deepseek2")  # architectures that read how weights of experts are scaled, and whether they add up to 1
_FOURTH = ("on", "on", "on", "off")


class Form(NamedTuple):
    """A row. families: those that may go here. layout: the ties of its tensors. lacks: what of a model llama.cpp does not do here, "" for
    nothing. written: keys beyond those of every architecture. read: those, as fields of a ModelConfig. factors: it divides frequencies by
    those of the file, which is how llama3's scaling is written."""

    families: tuple[str, ...]
    layout: Callable[[ModelConfig], list[Tie]]
    lacks: Callable[[ModelConfig], str] = lambda config: "sliding window" if config.window else ""
    written: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}
    read: Callable[[Fields, Stored], dict[str, Any]] = lambda fields, stored: {}
    factors: bool = False


def form_of(config: ModelConfig) -> str:
    """The architecture that a model goes to. Raises ConfigError, by name, where llama.cpp would not read it as it is."""
    if set(config.mixer) == {"rwkv"} and set(config.ffn) == {"swiglu"} and chosen(config) <= {"rwkv_head_dim"}:
        return "arwkv7"  # which transformers does not have
    families = families_of(config, "GGUF")
    lacking = {name: _lacks(form, config) for family in families for name, form in FORMS.items() if family in form.families}
    for name, lack in lacking.items():
        if not lack:
            return name
    what = f"A {families[0]} as this one has no GGUF form."
    why = [f"llama.cpp has no {lack} in {name}." for name, lack in lacking.items()] or [f"llama.cpp does not run {families[0]} as it is."]
    raise ConfigError(what, why[0], "Keep it neutral: both backends run it.")


# what llama.cpp lacks


def _lacks(form: Form, config: ModelConfig) -> str:
    return "RoPE scaled as llama3" if config.rope_scaling == "llama3" and not form.factors else form.lacks(config)


def _olmoe_lacks(config: ModelConfig) -> str:
    if config.kv_heads != config.heads:
        return "fewer key/value heads than heads"
    return "biases" if config.qkv_bias else "weights of experts that add up to 1" if config.norm_topk_prob else ""


def _smollm3_lacks(config: ModelConfig) -> str:
    turning = tuple(config.at(layer).rope_layers[0] for layer in range(config.layers))
    if turning != tuple(_FOURTH[layer % 4] for layer in range(config.layers)):
        return "choice of layers that do not turn by position (every fourth does not)"
    return "sliding window" if config.window else ""


def _olmo2_lacks(config: ModelConfig) -> str:
    windowed = tuple("on" if config.at(layer).window else "off" for layer in range(config.layers))
    if config.window and windowed != tuple(_FOURTH[layer % 4] for layer in range(config.layers)):
        return "choice of layers with a sliding window (every fourth has none)"
    return "biases" if config.qkv_bias else ""


def _qwen3moe_lacks(config: ModelConfig) -> str:
    if not config.norm_topk_prob:
        return "weights of experts that do not add up to 1"
    return "dense layers between" if "swiglu" in config.ffn else ""


def _granite_lacks(config: ModelConfig) -> str:
    return "experts" if "experts" in config.ffn else "ssm" if "ssm" in config.mixer else ""


def _granitemoe_lacks(config: ModelConfig) -> str:
    return "ssm" if "ssm" in config.mixer else "dense feed-forwards" if "experts" not in config.ffn else ""


# written


def _routed(config: ModelConfig) -> dict[str, Any]:
    if "experts" not in config.ffn:
        return {}
    shared = {"expert_shared_feed_forward_length": config.shared_experts * width(config)} if config.shared_experts else {}
    return {
        "expert_count": config.experts,
        "expert_used_count": config.experts_per_token,
        "expert_feed_forward_length": width(config),
        **shared,
    }


def _routed_alone(config: ModelConfig) -> dict[str, Any]:
    """Architectures that know one width of a feed-forward."""
    return _routed(config) | ({"feed_forward_length": width(config)} if "experts" in config.ffn else {})


_NO_SHARED = "smedjan.no_shared_experts"


def grouped(config: ModelConfig) -> dict[str, Any]:
    """The router that GLM and DeepSeek share."""
    if "experts" not in config.ffn:
        return {}
    return {
        **_routed(config),
        "expert_shared_count": max(1, config.shared_experts),
        "leading_dense_block_count": dense_prefix(config),
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": config.norm_topk_prob,
        "expert_gating_func": _SIGMOID if config.router == "bias" else _SOFTMAX,
        **(
            {"expert_group_count": config.expert_groups, "expert_group_used_count": config.expert_groups_per_token}
            if limited(config)
            else {}
        ),
        **({} if config.shared_experts else {_NO_SHARED: True}),
    }


def _multipliers(config: ModelConfig) -> dict[str, Any]:
    return {
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "logit_scale": float(config.logits_divisor),
        "attention.scale": float(config.attention_multiplier or config.head_dim**-0.5),
        "rope.scaling.finetuned": "off" not in config.rope_layers,  # whether it turns at all, there
        **_routed_alone(config),
    }


def _granitehybrid(config: ModelConfig) -> dict[str, Any]:
    return {
        **_multipliers(config),
        "attention.head_count_kv": [0 if config.mixer_of(layer) == "ssm" else config.kv_heads for layer in range(config.layers)],
        "ssm.conv_kernel": config.conv_width,
        "ssm.state_size": config.ssm_state,
        "ssm.group_count": config.ssm_groups,
        "ssm.inner_size": config.ssm_expand * config.dim,
        "ssm.time_step_rank": ssm.heads(config),
    }


def _olmo2(config: ModelConfig) -> dict[str, Any]:
    return {"attention.sliding_window": config.window} if config.window else {}


def _deepseek2(config: ModelConfig) -> dict[str, Any]:
    routed = grouped(config) or {"expert_feed_forward_length": config.ffn_dim, "expert_shared_count": 1, "expert_weights_scale": 1.0}
    return {
        "leading_dense_block_count": config.layers,
        **routed,
        "attention.head_count_kv": 1,  # the latent is the one key and value that all heads read
        "attention.key_length": kv_rank(config) + rope_dim(config),
        "attention.value_length": kv_rank(config),
        "attention.key_length_mla": config.head_dim + rope_dim(config),
        "attention.value_length_mla": config.head_dim,
        "attention.kv_lora_rank": kv_rank(config),
        **({"attention.q_lora_rank": config.mla_q_rank} if config.mla_q_rank else {}),
        "rope.dimension_count": rope_dim(config),
        **({"rope.scaling.yarn_log_multiplier": (plain_factor(config) - 1) / math.log(config.rope_factor)} if _yarn(config) else {}),
    }


def _yarn(config: ModelConfig) -> bool:
    return config.rope_scaling == "yarn"


def _deepseek2_lacks(config: ModelConfig) -> str:
    if "experts" in config.ffn and limited(config) and config.router == "softmax":
        return "groups of experts with the softmax router"
    if plain_factor(config) != attention_factor(config):
        return "factor of its own for what does not turn"
    return "" if config.mla_q_rank else "queries that are not compressed, but for models of 26 or 27 layers,"


def _arwkv7(config: ModelConfig) -> dict[str, Any]:
    ranks = {name: parameter_table(config)[f"layers.0.mixer.{name}1.weight"].shape[0] for name in "wag"}
    later = parameter_table(config).get("layers.1.mixer.v1.weight")
    return {
        "wkv.head_size": config.rwkv_head_dim,
        "token_shift_count": 1,
        "attention.decay_lora_rank": ranks["w"],
        "attention.iclr_lora_rank": ranks["a"],
        "attention.value_residual_mix_lora_rank": later.shape[0] if later else ranks["a"],
        "attention.gate_lora_rank": ranks["g"],
        "attention.head_count": 0,
    }


# read


def _read_experts(fields: Fields, stored: Stored, router: str = "softmax") -> dict[str, Any]:
    if not (experts := fields.number("expert_count", 0)):
        return {}
    gates = fields.number("expert_gating_func", _SIGMOID if router == "bias" else _SOFTMAX)
    if gates != (_SIGMOID if router == "bias" else _SOFTMAX):
        raise fields.inexpressible("a router of another kind")
    if fields.architecture not in _SCALED and fields.number("expert_weights_scale", 1.0, whole=False) not in (0, 1):
        raise fields.inexpressible("scaled weights of experts")
    layers, inputs = fields.number("block_count"), [name.split(".")[1] for name in stored if name.endswith("ffn_gate_inp.weight")]
    ffn = tuple("experts" if str(layer) in inputs else "swiglu" for layer in range(min(layers, len(stored))))
    hidden = fields.number("expert_feed_forward_length", fields.number("feed_forward_length"))
    shared = next((tensor.shape[1] for name, tensor in stored.items() if name.endswith("ffn_gate_shexp.weight")), 0)
    if fields.values.get(_NO_SHARED) is True:
        shared = 0
    if not hidden or shared % hidden:
        raise fields.inexpressible(f"shared experts of width {shared}")
    routed = {"experts": experts, "experts_per_token": fields.number("expert_used_count"), "expert_dim": hidden, "router": router}
    if fields.architecture in _SCALED:
        routed |= {
            "routed_scaling_factor": fields.real("expert_weights_scale", 0.0) or 1.0,
            "norm_topk_prob": fields.flag("expert_weights_norm", False),
            "expert_groups": max(1, fields.number("expert_group_count", 1)),
            "expert_groups_per_token": max(1, fields.number("expert_group_used_count", 1)),
        }
    return routed | {"ffn": shortest(ffn), "shared_experts": int(shared) // hidden}


def _read_phi3(fields: Fields, stored: Stored) -> dict[str, Any]:
    """The window that the model was trained with, in all layers; llama.cpp lets it see more."""
    window = fields.number("attention.sliding_window", 0)
    return {"window": window} if 0 < window < fields.number("context_length") else {}


def _read_smollm3(fields: Fields, stored: Stored) -> dict[str, Any]:
    layers = min(fields.number("block_count"), len(stored))
    return {"rope_layers": shortest(tuple(_FOURTH[layer % 4] for layer in range(layers)))}


def _read_olmo2(fields: Fields, stored: Stored) -> dict[str, Any]:
    found: dict[str, Any] = {"norms": "post", "qk_norm": True, "qk_norm_over": "all"}
    window = fields.number("attention.sliding_window", 0)
    if not window or window >= fields.number("context_length"):
        return found
    layers = min(fields.number("block_count"), len(stored))
    found |= {"window": window, "window_layers": shortest(tuple(_FOURTH[layer % 4] for layer in range(layers)))}
    if fields.text("rope.scaling.type") in ("", "none"):
        return found
    opposite = {"on": "off", "off": "on"}
    return found | {"rope_global_layers": shortest(tuple(opposite[_FOURTH[layer % 4]] for layer in range(layers)))}


def _read_multipliers(fields: Fields, stored: Stored) -> dict[str, Any]:
    heads, scale = fields.number("attention.head_count"), fields.real("attention.scale", 0.0)
    usual = float(f"{fields.number('attention.key_length', fields.number('embedding_length') // max(heads, 1)) ** -0.5:.7g}")
    return {
        "embedding_multiplier": fields.real("embedding_scale", 0.0) or 1.0,
        "residual_multiplier": fields.real("residual_scale", 0.0) or 1.0,
        "logits_divisor": fields.real("logit_scale", 0.0) or 1.0,
        "attention_multiplier": 0.0 if scale == usual else scale,
        **({} if fields.flag("rope.scaling.finetuned", fields.architecture != "granitehybrid") else {"rope_layers": ("off",)}),
        **_read_experts(fields, stored),
    }


def _read_granitehybrid(fields: Fields, stored: Stored) -> dict[str, Any]:
    shared = fields.values.get(f"{fields.architecture}.attention.head_count_kv")
    if not isinstance(shared, list) or len(set(shared) - {0}) > 1 or not all(type(count) is int for count in shared):
        raise fields.inexpressible(f"head_count_kv {shared!r:.60}")
    mixer = tuple("attention" if count else "ssm" for count in shared)
    heads = fields.number("attention.head_count")
    found = _read_multipliers(fields, stored)
    if "attention" not in mixer:
        found = {name: value for name, value in found.items() if name not in ("attention_multiplier", "rope_layers")}
    inner, dim = fields.number("ssm.inner_size"), fields.number("embedding_length")
    rank = fields.number("ssm.time_step_rank")
    if not rank or not dim or inner % rank or inner % dim:
        raise fields.inexpressible(f"{rank} heads of Mamba-2 in {inner} features")
    return found | {
        "mixer": shortest(mixer),
        "kv_heads": max(shared) or heads,
        "conv_width": fields.number("ssm.conv_kernel"),
        "ssm_state": fields.number("ssm.state_size"),
        "ssm_groups": fields.number("ssm.group_count"),
        "ssm_head_dim": inner // rank,
        "ssm_expand": inner // dim,
    }


def _read_deepseek2(fields: Fields, stored: Stored) -> dict[str, Any]:
    heads, dim, turned = fields.number("attention.head_count"), fields.number("embedding_length"), fields.number("rope.dimension_count")
    whole, size = fields.number("attention.key_length_mla", 0), fields.number("attention.value_length_mla", 0)
    if not size or whole != size + turned:
        raise fields.inexpressible(f"heads of {whole} and {size} features beside {turned} that turn")
    own = 0 if size * heads == dim else size
    found: dict[str, Any] = {"mixer": ("mla",), "kv_heads": heads, "head_size": own, "rope_dim": 0, "mla_rope_dim": turned}
    if fields.text("rope.scaling.type") == "yarn":
        log = math.log(max(fields.number("rope.scaling.factor", whole=False), 1.0))
        factor = float(f"{fields.real('rope.scaling.yarn_log_multiplier', 0.0) * log + 1:.7g}")
        found |= {"rope_attention_factor": 0.0 if math.isclose(factor, 0.1 * log + 1, rel_tol=1e-6) else factor}
    router = "bias" if fields.number("expert_gating_func", _SOFTMAX) == _SIGMOID else "softmax"
    ranks = {"mla_kv_rank": fields.number("attention.kv_lora_rank"), "mla_q_rank": fields.number("attention.q_lora_rank", 0)}
    return found | ranks | (_read_experts(fields, stored, router) if fields.number("expert_count", 0) else {})


def _read_arwkv7(fields: Fields, stored: Stored) -> dict[str, Any]:
    size = fields.number("wkv.head_size")
    heads = fields.number("embedding_length") // max(1, size)
    return {"mixer": ("rwkv",), "rwkv_head_dim": size, "heads": heads, "kv_heads": heads, "head_size": 0, "rope_dim": 0}


_turned = functools.partial(gguf_layouts.transformer, turned=True)

FORMS: dict[str, Form] = {
    "llama": Form(("llama", "mistral", "ministral", "mixtral"), _turned, written=_routed_alone, read=_read_experts, factors=True),
    "qwen2": Form(("qwen2",), gguf_layouts.transformer),
    "qwen3": Form(("qwen3",), gguf_layouts.transformer),
    "qwen3moe": Form(("qwen3_moe",), gguf_layouts.transformer, _qwen3moe_lacks, _routed, _read_experts),
    "smollm3": Form(("smollm3",), _turned, _smollm3_lacks, read=_read_smollm3),
    "phi3": Form(("phi3",), gguf_layouts.phi3, read=_read_phi3),
    "olmo2": Form(("olmo2", "olmo3"), functools.partial(gguf_layouts.transformer, head=True), _olmo2_lacks, _olmo2, _read_olmo2),
    "glm4moe": Form(
        ("glm4_moe",),
        functools.partial(gguf_layouts.transformer, second="post_attention_norm"),
        lambda config: "",
        grouped,
        functools.partial(_read_experts, router="bias"),
    ),
    "olmoe": Form(
        ("olmoe",),
        gguf_layouts.transformer,
        _olmoe_lacks,
        _routed_alone,
        lambda fields, stored: {"qk_norm_over": "all", **_read_experts(fields, stored), "norm_topk_prob": False},
    ),
    "deepseek2": Form(("deepseek_v3", "deepseek_v2"), gguf_layouts.deepseek2, _deepseek2_lacks, _deepseek2, _read_deepseek2),
    "qwen35": Form(
        ("qwen3_5",), gguf_delta.qwen35, gguf_delta.lacks, gguf_delta.written, lambda fields, stored: gguf_delta.read(fields, stored, {})
    ),
    "qwen3next": Form(
        ("qwen3_next",),
        gguf_delta.qwen3next,
        gguf_delta.lacks,
        lambda config: {**_routed(config), **gguf_delta.written(config)},
        lambda fields, stored: gguf_delta.read(fields, stored, _read_experts(fields, stored)),
    ),
    "arwkv7": Form((), gguf_layouts.arwkv7, lambda config: "", _arwkv7, _read_arwkv7),
    "granite": Form(("granite", "granitemoehybrid"), _turned, _granite_lacks, _multipliers, _read_multipliers, True),
    "granitemoe": Form(("granitemoehybrid",), _turned, _granitemoe_lacks, _multipliers, _read_multipliers, True),
    "granitehybrid": Form(("granitemoehybrid",), gguf_layouts.granitehybrid, lambda config: "", _granitehybrid, _read_granitehybrid, True),
}
