"""The architectures of others that hold a model of smedjan: what config.json calls them, and which models each holds.

| model_type | models | what it holds |
|---|---|---|
| llama | Llama 1 to 3.3, TinyLlama, SmolLM2, and most that came after | attention and SwiGLU; biases of all of q, k, v and o |
| qwen2 | Qwen 2 and 2.5 | biases of q, k and v; a sliding window in any layers |
| qwen3 | Qwen 3 | RMSNorm over each head of q and k; a sliding window in any layers |
| mistral | Mistral 7B, Nemo | a sliding window in all layers |
| ministral | Ministral 8B | a sliding window in some layers |
| smollm3 | SmolLM3 | layers that do not turn by position, and windows in any |
| mixtral | Mixtral | experts with the softmax router in all layers |
| qwen3_moe | Qwen 3 MoE | the same with head norms, and dense layers between |
| glm4_moe | GLM 4.5 | experts with the bias router, shared ones too, after a prefix of dense layers |
| olmo2 | OLMo 2 | norms after mixers and feed-forwards; RMSNorm over all heads of q and of k together |
| olmo3 | OLMo 3 | the same; a sliding window in some layers, and RoPE that is scaled in the others |
| phi3 | Phi-3, Phi-4 | longrope, a part of each head that turns, a sliding window in all layers; q, k and v in one tensor, gate and up |
| granite | Granite 3 | multipliers of embeddings, residuals, scores and logits |
| granitemoehybrid | Granite 4 | the same; Mamba-2, attention, turned or not, or both; SwiGLU, or experts with shared ones |
| olmoe | OLMoE | experts with the softmax router in all layers, RMSNorm over all heads of q and of k together |
| deepseek_v3 | DeepSeek V3, Moonlight | latent attention; SwiGLU, or experts with the bias router after a prefix of dense layers |
| deepseek_v2 | DeepSeek V2, V2-Lite | the same with the softmax router, whose weights stay as they are |
| qwen3_5 | Qwen 3.5 | Gated DeltaNet and attention with head norms, each with heads of its own; a gate on attention |
| qwen3_next | Qwen3-Next | the same in any order, with experts and shared ones behind a gate |
| qwen3_5_moe | Qwen 3.5 MoE | the same in all layers; it goes out as qwen3_next |

A model goes out as the first row that holds it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from convert import layouts
from convert.ties import Tie
from smedjan_common.config import ModelConfig
from smedjan_common.errors import ConfigError
from smedjan_common.model import rope

HEADS = {"head_size"}
EXPERTS = {"experts", "experts_per_token", "expert_dim"}
SHARED = {*EXPERTS, "shared_experts"}
GROUPED = {*SHARED, "router", "expert_groups", "expert_groups_per_token", "routed_scaling_factor", "norm_topk_prob"}
LATENT = {*HEADS, "mla_kv_rank", "mla_q_rank", "mla_rope_dim", "mla_plain_factor", "rope_attention_factor"}
MULTIPLIERS = {"embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_divisor"}
WINDOWS = {"window", "window_layers"}
GATED = {"qk_norm", "rope_dim", "conv_width", "attention_gate", "qkv_bias", "o_bias"}
DELTA = {*HEADS, *GATED, "delta_key_heads", "delta_value_heads", "delta_key_size", "delta_value_size"}
QWEN = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28}


class Family(NamedTuple):
    """A row.

    architecture: transformers' class. defaults: what transformers takes where config.json is silent. options: fields of a ModelConfig it
    may have beside those of every row. holds: whether it holds a model without other options. layout: the ties of its tensors.
    """

    architecture: str
    defaults: Mapping[str, Any]
    options: set[str]
    holds: Callable[[ModelConfig], bool]
    layout: Callable[[ModelConfig], list[Tie]] = layouts.llama


def _plain(config: ModelConfig) -> bool:
    return set(config.mixer) == {"attention"} and set(config.ffn) == {"swiglu"}


def _olmo2(config: ModelConfig) -> bool:
    normed = (config.norms, config.qk_norm, config.qk_norm_over) == ("post", True, "all")
    return _plain(config) and normed and config.qkv_bias == config.o_bias


def _olmo3(config: ModelConfig) -> bool:
    """Windows in some layers; the others alone are scaled, by a form that has a name there."""
    kinds = {(layer.window > 0, layer.rope_scaling != "none") for layer in map(config.at, range(config.layers))}
    scaled = {(True, False), (False, True)} if config.rope_scaling != "none" else {(True, False), (False, False)}
    return _olmo2(config) and config.rope_scaling != "ntk" and kinds == scaled


def _dense_first(config: ModelConfig) -> bool:
    """Whether no dense layer comes after one with experts, and there is one of those."""
    kinds = [config.ffn_of(layer) for layer in range(config.layers)]
    return "experts" in kinds and "swiglu" not in kinds[kinds.index("experts") :]


def dense_prefix(config: ModelConfig) -> int:
    """How many dense layers come first."""
    return sum(config.ffn_of(layer) == "swiglu" for layer in range(config.layers))


def _mixtral(config: ModelConfig) -> bool:
    return set(config.mixer) == {"attention"} and set(config.ffn) == {"experts"} and config.router == "softmax"


def _qwen3_moe(config: ModelConfig) -> bool:
    return set(config.mixer) == {"attention"} and "experts" in config.ffn and config.router == "softmax" and config.qk_norm


def _glm4_moe(config: ModelConfig) -> bool:
    return set(config.mixer) == {"attention"} and config.router == "bias" and _dense_first(config)


def _granite(config: ModelConfig) -> bool:
    kinds = {config.ffn_of(layer) for layer in range(config.layers)}
    routed = kinds == {"experts"} and config.router == "softmax" and config.shared_experts > 0
    alike = len(set(config.rope_layers)) == 1
    return (
        alike
        and set(config.mixer) <= {"ssm", "attention"}
        and (routed or (kinds == {"swiglu"} and ("ssm" in config.mixer or "off" in config.rope_layers)))
    )


def _olmoe(config: ModelConfig) -> bool:
    normed = config.qk_norm and config.qk_norm_over == "all" and config.qkv_bias == config.o_bias
    return set(config.mixer) == {"attention"} and set(config.ffn) == {"experts"} and config.router == "softmax" and normed


def _latent(config: ModelConfig) -> bool:
    """Other scalings of RoPE have no form there, nor has a factor of what does not turn: without YaRN none, with it none under 1."""
    if set(config.mixer) != {"mla"} or config.rope_scaling not in ("none", "yarn"):
        return False
    plain = rope.plain_factor(config)
    return plain >= 1 if config.rope_scaling == "yarn" else plain == 1


def _deepseek_v3(config: ModelConfig) -> bool:
    routed = config.router == "bias" and _dense_first(config)
    return _latent(config) and (set(config.ffn) == {"swiglu"} or routed)


def _deepseek_v2(config: ModelConfig) -> bool:
    """Programs disagree whether it adds weights of a token's experts up to 1, where it is asked to."""
    return _latent(config) and config.router == "softmax" and not config.norm_topk_prob and _dense_first(config)


def _delta(config: ModelConfig) -> bool:
    mixers = {config.mixer_of(layer) for layer in range(config.layers)}
    return mixers == {"gated-deltanet", "attention"} and config.qk_norm and config.qkv_bias == config.o_bias


def _qwen3_5(config: ModelConfig) -> bool:
    """Attention comes every so many layers, at the end of each pattern."""
    interval = len(config.mixer)
    regular = config.mixer == ("gated-deltanet",) * (interval - 1) + ("attention",)
    return _delta(config) and set(config.ffn) == {"swiglu"} and regular


def _qwen3_next(config: ModelConfig) -> bool:
    return _delta(config) and "experts" in config.ffn and config.router == "softmax" and config.shared_experts > 0


# transformers' Qwen3-Next and Qwen 3.5 where config.json is silent; attention comes in every fourth layer
_DELTA = {
    **{"num_key_value_heads": 2, "head_dim": 256, "max_position_embeddings": 32768, "partial_rotary_factor": 0.25},
    **{"linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128},
    **{"linear_num_key_heads": 16, "linear_num_value_heads": 32},
}
_DELTA_EXPERTS = {"moe_intermediate_size": 512, "shared_expert_intermediate_size": 512}


FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        {"max_position_embeddings": 2048},
        {*HEADS, "qkv_bias", "o_bias"},
        lambda config: _plain(config) and config.qkv_bias == config.o_bias,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        QWEN,
        {*WINDOWS, "qkv_bias"},
        lambda config: _plain(config) and config.qkv_bias and not config.o_bias,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {**QWEN, "head_dim": 128},
        {*HEADS, *WINDOWS, "qk_norm"},
        lambda config: _plain(config) and config.qk_norm,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        {*HEADS, "window"},
        _plain,
    ),
    "ministral": Family(
        "MinistralForCausalLM",
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        {*HEADS, *WINDOWS},
        _plain,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        {"num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 2e6},
        {*HEADS, *WINDOWS, "rope_layers", "qkv_bias", "o_bias"},
        lambda config: _plain(config) and config.qkv_bias == config.o_bias,
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
        {"norms", "qk_norm", "qk_norm_over", "qkv_bias", "o_bias"},
        _olmo2,
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 5e5, "sliding_window": 4096},
        {*WINDOWS, "rope_global_layers", "norms", "qk_norm", "qk_norm_over", "qkv_bias", "o_bias"},
        _olmo3,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        {"window", "rope_dim", "rope_attention_factor", "rope_short_factors", "rope_long_factors"},
        lambda config: _plain(config) and config.rope_scaling in ("none", "ntk", "longrope"),
        layouts.phi3,
    ),
    "granite": Family(
        "GraniteForCausalLM",
        {"max_position_embeddings": 2048},
        {*MULTIPLIERS, "qkv_bias", "o_bias"},
        lambda config: _plain(config) and config.qkv_bias == config.o_bias,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        {"num_key_value_heads": 8, "max_position_embeddings": 131072, "num_local_experts": 8, "num_experts_per_tok": 2},
        {*HEADS, *EXPERTS},
        _mixtral,
        layouts.mixtral,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {"num_key_value_heads": 4, "max_position_embeddings": 32768},
        {*HEADS, *EXPERTS, "qk_norm", "norm_topk_prob"},
        _qwen3_moe,
        layouts.qwen3_moe,
    ),
    "glm4_moe": Family(
        "Glm4MoeForCausalLM",
        {"max_position_embeddings": 131072, "partial_rotary_factor": 0.5, "first_k_dense_replace": 1},
        {*HEADS, *GROUPED, "qk_norm", "qkv_bias", "rope_dim"},
        lambda config: _glm4_moe(config) and not config.o_bias,
        layouts.glm4_moe,
    ),
    "granitemoehybrid": Family(
        "GraniteMoeHybridForCausalLM",
        {"max_position_embeddings": 2048},
        {*SHARED, *MULTIPLIERS, "rope_layers", "conv_width", "ssm_state", "ssm_head_dim", "ssm_expand", "ssm_groups"},
        _granite,
        layouts.granitemoehybrid,
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        {"max_position_embeddings": 4096, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5},
        {*GROUPED, *LATENT},
        _deepseek_v3,
        layouts.deepseek_v3,
    ),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        {"max_position_embeddings": 2048, "topk_method": "greedy"},
        {*GROUPED, *LATENT},
        _deepseek_v2,
        layouts.deepseek_v3,
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8},
        {*EXPERTS, "norm_topk_prob", "qk_norm", "qk_norm_over", "qkv_bias", "o_bias"},
        _olmoe,
        layouts.qwen3_moe,
    ),
    "qwen3_5": Family("Qwen3_5ForCausalLM", {**_DELTA, "num_key_value_heads": 4}, DELTA, _qwen3_5, layouts.qwen3_5),
    "qwen3_next": Family(
        "Qwen3NextForCausalLM",
        {**_DELTA, **_DELTA_EXPERTS, "num_experts": 512, "num_experts_per_tok": 10},
        {*DELTA, *SHARED, "shared_gate", "norm_topk_prob"},
        _qwen3_next,
        layouts.qwen3_next,
    ),
    "qwen3_5_moe": Family(
        "Qwen3_5MoeForCausalLM",
        {**_DELTA, **_DELTA_EXPERTS, "num_experts": 256, "num_experts_per_tok": 8, "intermediate_size": 512},  # which no layer has
        {*DELTA, *SHARED, "shared_gate"},
        lambda config: _qwen3_next(config) and set(config.ffn) == {"experts"},
        layouts.qwen3_5_moe,
    ),
}

# What of a ModelConfig every row can say; a field that is added later is refused until it is thought about here.
EXPRESSED = {
    *("vocab_size", "dim", "layers", "heads", "kv_heads", "ffn_dim", "context_length", "mixer", "ffn", "norm_eps", "tied_head"),
    *("rope_base", "rope_scaling", "rope_factor", "rope_original_len", "rope_low_freq_factor", "rope_high_freq_factor", "init_std"),
}


def family_of(config: ModelConfig, target: str) -> str:
    """The first row that holds a model. `target` names the format in errors. Raises ConfigError, by name, for what none does."""
    return families_of(config, target)[0]


def chosen(config: ModelConfig) -> set[str]:
    """Fields beyond those that every row can say that are not as they are by default."""
    values, plain = config.to_dict(), ModelConfig(64, 2, 1, 1, 1, 1).to_dict()
    return {name for name in values.keys() - EXPRESSED if values[name] != plain[name]}


def families_of(config: ModelConfig, target: str) -> list[str]:
    """Every row that holds a model, and the error of `family_of` where none does."""
    special = chosen(config)
    if found := [name for name, family in FAMILIES.items() if special <= family.options and family.holds(config)]:
        return found
    kinds, values = ", ".join(dict.fromkeys((*config.mixer, *config.ffn))), config.to_dict()
    wanted = ", ".join(f"{name} = {value}" for name, value in sorted((name, values[name]) for name in special))
    raise ConfigError(
        f"A model of {kinds}{' with ' if wanted else ''}{wanted} has no {target} form.",
        "No architecture that other programs run has it; docs/convert.md lists those that there are.",
        "Keep it neutral: both backends run it.",
    )
