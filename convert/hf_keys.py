"""What config.json says beyond a plain Llama, by architecture: written from a ModelConfig, and read into fields of one.

What these keys ask for and a model of smedjan does not compute is refused by name.
"""

from collections.abc import Callable, Mapping
from typing import Any

from convert import hf_delta
from convert.families import dense_prefix
from convert.hf_rope import turned_dim
from convert.hf_values import asks_for, inexpressible, integer, number, shortest
from smedjan_common.config import ModelConfig
from smedjan_common.model.ffns.experts import limited, width
from smedjan_common.model.mixers import ssm
from smedjan_common.model.mixers.mla import kv_rank, rope_dim

Values = Mapping[str, Any]


# written


def _mixtral(config: ModelConfig) -> dict[str, Any]:
    return {
        "intermediate_size": width(config),
        "num_local_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
        "sliding_window": None,
    }


def _routed(config: ModelConfig) -> dict[str, Any]:
    return {
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": width(config),
        "norm_topk_prob": config.norm_topk_prob,
    }


def _qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    more = {"mlp_only_layers": _dense(config), "decoder_sparse_step": 1, "sliding_window": None}
    return {**_routed(config), "num_experts": config.experts, **more}


def _dense(config: ModelConfig) -> list[int]:
    """Layers without experts."""
    return [layer for layer in range(config.layers) if config.ffn_of(layer) == "swiglu"]


_NO_SHARED = "smedjan_no_shared_experts"


def _grouped(config: ModelConfig) -> dict[str, Any]:
    """The router that DeepSeek V3 and GLM share."""
    return {
        **_routed(config),
        "n_routed_experts": config.experts,
        "n_shared_experts": max(1, config.shared_experts),  # programs fail without one: it is written with weights of zero
        **({} if config.shared_experts else {_NO_SHARED: True}),
        "n_group": config.expert_groups,
        "topk_group": config.expert_groups_per_token,
        "routed_scaling_factor": config.routed_scaling_factor,
        "first_k_dense_replace": dense_prefix(config),
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "tie_word_embeddings": False,  # the head is written out: not every program ties it in this architecture
        "num_nextn_predict_layers": 0,
    }


def _glm4_moe(config: ModelConfig) -> dict[str, Any]:
    return {**_grouped(config), "use_qk_norm": config.qk_norm, "attention_bias": config.qkv_bias, **_part(config)}


def _part(config: ModelConfig) -> dict[str, Any]:
    return {"partial_rotary_factor": turned_dim(config) / config.head_dim}


def _deepseek_v3(config: ModelConfig) -> dict[str, Any]:
    routed = _grouped(config) if "experts" in config.ffn else {**_NO_EXPERTS, "first_k_dense_replace": config.layers}
    return {
        **routed,
        "kv_lora_rank": kv_rank(config),
        "q_lora_rank": config.mla_q_rank or None,
        "qk_nope_head_dim": config.head_dim,
        "qk_rope_head_dim": rope_dim(config),
        "v_head_dim": config.head_dim,
        "head_dim": rope_dim(config),  # what turns, for this architecture
        "rope_interleave": True,
    }


def _deepseek_v2(config: ModelConfig) -> dict[str, Any]:
    method = "group_limited_greedy" if limited(config) else "greedy"
    return {**_deepseek_v3(config), "scoring_func": "softmax", "topk_method": method}


def _olmoe(config: ModelConfig) -> dict[str, Any]:
    routed = {name: value for name, value in _routed(config).items() if name != "moe_intermediate_size"}
    return {**routed, "num_experts": config.experts, "intermediate_size": width(config), "clip_qkv": None}


_NO_EXPERTS = {  # a dense model of this architecture still has to say something valid
    **{"n_routed_experts": 2, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 8, "norm_topk_prob": True},
    **{"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    **{"moe_layer_freq": 1, "tie_word_embeddings": False, "num_nextn_predict_layers": 0},
}


def _multipliers(config: ModelConfig) -> dict[str, Any]:
    return {
        "embedding_multiplier": config.embedding_multiplier,
        "residual_multiplier": config.residual_multiplier,
        "logits_scaling": config.logits_divisor,
        "attention_multiplier": config.attention_multiplier or config.head_dim**-0.5,
    }


def _granitemoehybrid(config: ModelConfig) -> dict[str, Any]:
    experts = "experts" in config.ffn
    layers = [config.mixer_of(layer) for layer in range(config.layers)]
    return {
        "layer_types": ["mamba" if name == "ssm" else "attention" for name in layers],
        "intermediate_size": width(config) if experts else config.ffn_dim,
        "shared_intermediate_size": config.shared_experts * width(config) if experts else config.ffn_dim,
        "num_local_experts": config.experts if experts else 0,
        "num_experts_per_tok": config.experts_per_token if experts else 0,
        **_multipliers(config),
        "position_embedding_type": "nope" if "off" in config.rope_layers else "rope",  # nope: whatever is not rope does not turn
        "mamba_n_heads": ssm.heads(config),
        "mamba_d_head": config.ssm_head_dim,
        "mamba_d_state": config.ssm_state,
        "mamba_n_groups": config.ssm_groups,
        "mamba_d_conv": config.conv_width,
        "mamba_expand": config.ssm_expand,
        "mamba_chunk_size": 256,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "time_step_limit": [0.0, 1e30],  # written: without it mlx-lm has bounds of its own
    }


def _qwen3_next(config: ModelConfig) -> dict[str, Any]:
    shared = {"shared_expert_intermediate_size": config.shared_experts * width(config), "decoder_sparse_step": 1}
    return {**hf_delta.written(config), **_routed(config), **shared, "num_experts": config.experts, "mlp_only_layers": _dense(config)}


def _windows(config: ModelConfig) -> dict[str, Any]:
    """Windows of any layers: as transformers and mlx-lm read them, and, where full layers come first, by their number too."""
    if not config.window:
        return {}
    windowed = [config.at(layer).window > 0 for layer in range(config.layers)]
    full = windowed.index(True)
    return {
        "use_sliding_window": True,
        "sliding_window": config.window,
        "max_window_layers": full if all(windowed[full:]) else config.layers,
        "layer_types": ["sliding_attention" if each else "full_attention" for each in windowed],
    }


def _phi3(config: ModelConfig) -> dict[str, Any]:
    """transformers takes the original context from here."""
    found = {"sliding_window": config.window or None, **_part(config)}
    return found | ({"original_max_position_embeddings": config.rope_original_len} if config.rope_scaling == "longrope" else {})


def _smollm3(config: ModelConfig) -> dict[str, Any]:
    turning = [int(config.at(layer).rope_layers == ("on",)) for layer in range(config.layers)]
    return {"use_sliding_window": False, "sliding_window": None, **_windows(config), "no_rope_layers": turning}


WRITTEN: dict[str, Callable[[ModelConfig], dict[str, Any]]] = {
    "qwen2": _windows,
    "qwen3": _windows,
    "mistral": lambda config: {"sliding_window": config.window or None},
    "ministral": _windows,
    "smollm3": _smollm3,
    "olmo3": _windows,
    "phi3": _phi3,
    "granite": _multipliers,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
    "glm4_moe": _glm4_moe,
    "granitemoehybrid": _granitemoehybrid,
    "deepseek_v3": _deepseek_v3,
    "deepseek_v2": _deepseek_v2,
    "olmoe": _olmoe,
    "qwen3_5": hf_delta.written,
    "qwen3_next": _qwen3_next,
}


# read


def _experts_of(values: Values, where: str, count: str, hidden: str, router: str = "softmax") -> dict[str, Any]:
    return {
        "experts": integer(values, count, where),
        "experts_per_token": integer(values, "num_experts_per_tok", where),
        "expert_dim": integer(values, hidden, where),
        "router": router,
    }


def _read_mixtral(values: Values, where: str) -> dict[str, Any]:
    return {"ffn": ("experts",), **_experts_of(values, where, "num_local_experts", "intermediate_size")}


def _read_qwen3_moe(values: Values, where: str) -> dict[str, Any]:
    count = "num_experts" if "num_experts" in values else "num_local_experts"
    asks_for(values, where, decoder_sparse_step=1)
    routed = {**_experts_of(values, where, count, "moe_intermediate_size"), "norm_topk_prob": values.get("norm_topk_prob") is True}
    return {"qk_norm": True, "ffn": _ffn(values, where), **routed}


def _ffn(values: Values, where: str) -> tuple[str, ...]:
    """Experts but in the layers that are named."""
    dense, layers = set(values.get("mlp_only_layers") or ()), integer(values, "num_hidden_layers", where)
    return shortest(tuple("swiglu" if layer in dense else "experts" for layer in range(layers)))


def _read_olmoe(values: Values, where: str) -> dict[str, Any]:
    if values.get("clip_qkv") is not None:
        why = "Queries, keys and values are not clipped here"
        raise inexpressible(where, f"clip_qkv {values['clip_qkv']!r}", why)
    routed = {**_experts_of(values, where, "num_experts", "intermediate_size"), "norm_topk_prob": values.get("norm_topk_prob") is True}
    return {"qk_norm": True, "qk_norm_over": "all", "ffn": ("experts",), **routed}


def _read_grouped(values: Values, where: str, router: str = "bias") -> dict[str, Any]:
    layers = integer(values, "num_hidden_layers", where)
    dense = values.get("first_k_dense_replace", 0)
    if type(dense) is not int or not 0 <= dense <= layers:
        raise inexpressible(where, f"first_k_dense_replace {dense!r}", "It counts layers")
    if dense == layers:
        return {}
    asks_for(values, where, moe_layer_freq=1, scoring_func="sigmoid" if router == "bias" else "softmax")
    found = _experts_of(values, where, "n_routed_experts", "moe_intermediate_size", router)
    found |= {"expert_groups": integer(values, "n_group", where, 1), "expert_groups_per_token": integer(values, "topk_group", where, 1)}
    found |= {"routed_scaling_factor": number(values, "routed_scaling_factor", where, 1.0)}
    found |= {"norm_topk_prob": values.get("norm_topk_prob", True) is not False}
    ffn = ("swiglu",) * dense + ("experts",) * (layers - dense)
    shared = 0 if values.get(_NO_SHARED) is True else values.get("n_shared_experts") or 0
    return found | {"ffn": shortest(ffn), "shared_experts": shared}


def _read_glm4_moe(values: Values, where: str) -> dict[str, Any]:
    return {**_read_grouped(values, where), "qk_norm": values.get("use_qk_norm") is True, "o_bias": False}


def _read_latent(values: Values, where: str) -> dict[str, Any]:
    dim, heads = integer(values, "hidden_size", where), integer(values, "num_attention_heads", where)
    size = integer(values, "qk_nope_head_dim", where)
    if (other := values.get("v_head_dim", size)) != size:
        raise inexpressible(
            where, f"v_head_dim {other!r} beside qk_nope_head_dim {size}", "Values are as wide as what does not turn of keys"
        )
    ranks = {"mla_kv_rank": integer(values, "kv_lora_rank", where), "mla_rope_dim": integer(values, "qk_rope_head_dim", where)}
    q_rank = 0 if values.get("q_lora_rank") is None else integer(values, "q_lora_rank", where)
    own = {"head_size": 0 if size * heads == dim else size, "kv_heads": heads, "qkv_bias": False, "o_bias": False}
    return {"mixer": ("mla",), **own, "mla_q_rank": q_rank, **ranks}


def _read_deepseek_v3(values: Values, where: str) -> dict[str, Any]:
    return {**_read_latent(values, where), **_read_grouped(values, where)}


def _read_deepseek_v2(values: Values, where: str) -> dict[str, Any]:
    """transformers leaves the weights of a token's experts as they are, whatever norm_topk_prob says."""
    method = values.get("topk_method")
    if method not in ("greedy", "group_limited_greedy"):
        raise inexpressible(where, f"topk_method {method!r}", "Experts are chosen greedy or group_limited_greedy there")
    asks_for(values, where, norm_topk_prob=False)
    routed = _read_grouped({**values, **({"n_group": 1, "topk_group": 1} if method == "greedy" else {})}, where, "softmax")
    return {**_read_latent(values, where), **routed, **({"norm_topk_prob": False} if routed else {})}


def _read_multipliers(values: Values, where: str) -> dict[str, Any]:
    """Each is 1 where config.json is silent, that of the scores too."""
    dim, heads = integer(values, "hidden_size", where), integer(values, "num_attention_heads", where)
    scores = number(values, "attention_multiplier", where, 1.0)
    usual = integer(values, "head_dim", where, max(1, dim // heads)) ** -0.5
    return {
        "embedding_multiplier": number(values, "embedding_multiplier", where, 1.0),
        "residual_multiplier": number(values, "residual_multiplier", where, 1.0),
        "logits_divisor": number(values, "logits_scaling", where, 1.0),
        "attention_multiplier": 0.0 if scores == usual else scores,
    }


_FAR = 1e6  # no softplus comes near
_SINCE_5 = {"linear_attention": "mamba", "full_attention": "attention"}  # transformers 5's names of Granite 4's layers


def _unbounded(limit: Any) -> bool:
    """Whether bounds of time steps bound nothing. transformers writes an infinite one as {"__float__": "Infinity"}."""
    if not isinstance(limit, list):
        return limit is None
    low, high = (float(each["__float__"] if isinstance(each, dict) else each) for each in limit)
    return low <= 0 and high >= _FAR


def _read_granitemoehybrid(values: Values, where: str) -> dict[str, Any]:
    kinds = values.get("layer_types") or values.get("layers_block_type")
    if not isinstance(kinds, list) or set(map(str, kinds)) - {"mamba", "attention", *_SINCE_5}:
        raise inexpressible(where, f"layer_types {kinds!r}", "Layers are mamba or attention")
    kinds = [_SINCE_5.get(kind, kind) for kind in kinds]
    asks_for(values, where, mamba_conv_bias=True)
    mixer = shortest(tuple("ssm" if kind == "mamba" else "attention" for kind in kinds))
    found: dict[str, Any] = {"mixer": mixer, **_read_multipliers(values, where)}
    if "attention" not in kinds:
        found["attention_multiplier"] = 0.0
    elif (turned := values.get("position_embedding_type")) not in ("rope", "nope", None):
        raise inexpressible(where, f"position_embedding_type {turned!r}", "Attention here turns (rope) or does not (nope)")
    elif turned != "rope":
        found["rope_layers"] = ("off",)
    if "mamba" in kinds:
        asks_for(values, where, mamba_proj_bias=False)
        if not _unbounded(values.get("time_step_limit")):
            raise inexpressible(where, f"time_step_limit {values['time_step_limit']!r}", "Time steps have no bounds here")
        names = {"ssm_state": "mamba_d_state", "ssm_head_dim": "mamba_d_head", "ssm_groups": "mamba_n_groups", "ssm_expand": "mamba_expand"}
        found |= {name: integer(values, key, where) for name, key in (names | {"conv_width": "mamba_d_conv"}).items()}
    if not values.get("num_local_experts"):
        return found | {"ffn_dim": integer(values, "shared_intermediate_size", where)}
    hidden, shared = integer(values, "intermediate_size", where), integer(values, "shared_intermediate_size", where)
    if shared % hidden:
        raise inexpressible(where, f"shared experts of width {shared}", f"They are a multiple of an expert's, {hidden}")
    routed = _experts_of(values, where, "num_local_experts", "intermediate_size")
    return found | routed | {"ffn": ("experts",), "shared_experts": shared // hidden}


def _read_qwen3_next(values: Values, where: str) -> dict[str, Any]:
    asks_for(values, where, decoder_sparse_step=1)
    found = _experts_of(values, where, "num_experts", "moe_intermediate_size")
    shared = integer(values, "shared_expert_intermediate_size", where)
    if shared % found["expert_dim"]:
        raise inexpressible(where, f"a shared expert of width {shared}", f"It is a multiple of an expert's, {found['expert_dim']}")
    more = {"ffn": _ffn(values, where), "shared_experts": shared // found["expert_dim"], "shared_gate": True}
    more["norm_topk_prob"] = values.get("norm_topk_prob") is not False
    return {**hf_delta.read(values, where), **found, **more}


def _read_qwen3_5_moe(values: Values, where: str) -> dict[str, Any]:
    found = _read_qwen3_next({**values, "mlp_only_layers": [], "norm_topk_prob": True}, where)
    return {**found, "ffn_dim": found["expert_dim"]}  # no layer has another


def rope_layers(values: Values, where: str) -> tuple[str, ...]:
    """Of each layer of a SmolLM3, on where it turns by position."""
    layers, turning = integer(values, "num_hidden_layers", where), values.get("no_rope_layers")
    if turning is None:
        every = integer(values, "no_rope_layer_interval", where, 4)
        turning = [(layer + 1) % every for layer in range(layers)]
    if not isinstance(turning, list) or len(turning) < layers:
        raise inexpressible(where, f"no_rope_layers {turning!r}", "It has a number for every layer, 1 where it turns")
    return tuple("on" if turning[layer] else "off" for layer in range(layers))


READ: dict[str, Callable[[Values, str], dict[str, Any]]] = {
    "qwen2": lambda values, where: {"qkv_bias": True, "o_bias": False},
    "qwen3": lambda values, where: {"qk_norm": True},
    "smollm3": lambda values, where: {"rope_layers": shortest(rope_layers(values, where))},
    **dict.fromkeys(("olmo2", "olmo3"), lambda values, where: {"norms": "post", "qk_norm": True, "qk_norm_over": "all"}),
    "phi3": lambda values, where: {"qkv_bias": False, "o_bias": False},
    "granite": _read_multipliers,
    "mixtral": _read_mixtral,
    "qwen3_moe": _read_qwen3_moe,
    "glm4_moe": _read_glm4_moe,
    "granitemoehybrid": _read_granitemoehybrid,
    "deepseek_v3": _read_deepseek_v3,
    "deepseek_v2": _read_deepseek_v2,
    "olmoe": _read_olmoe,
    "qwen3_5": hf_delta.read,
    "qwen3_next": _read_qwen3_next,
    "qwen3_5_moe": _read_qwen3_5_moe,
}
