"""The suite's models: what the rows' options are in them, by name of the row. Width 32, 4 heads, 17 tokens; a row that is not named
takes its defaults.

A remark says what was measured where a value is not just small. Variants go with the first feed-forward (or attention) once more.
"""

from collections.abc import Mapping
from typing import Any

Values = Mapping[str, Any]

SMALL: dict[str, Values] = {
    # early in a sequence o is a few v, each times a q . k of any sign; where they cancel the norm magnifies float32 rounding up to
    # eps^-1/2 times, and 20 training steps amplify it (one backend against itself, other chunks: 2e-3 at 1e-5, 4e-5 at 1e-2, 1e-6 at 0.1)
    "linear": {"norm_eps": 0.03},
    "ssm": {"ssm_state": 8, "ssm_head_dim": 16},
    "block-sparse": {"block_size": 4, "block_topk": 2},
    # wider random matrices (the suite's init_std is 0.15) make its low-rank gates so steep that sums in another order differ by 2e-6; at a
    # norm_eps of 1e-5 the rounding of the parameters alone moved the whole gradient by 8.9e-7 in float64, here by 5.8e-7; at 1e-2
    # the second layer's w1 a thousandth off would pass
    "rwkv": {"rwkv_head_dim": 8, "init_std": 0.06, "norm_eps": 5e-3},
    "gated-deltanet": {
        "norm_eps": 1e-3
    },  # its outputs at the start, of 4e-4, meet the eps of the norm, which magnifies what rounding leaves
    "experts": {"experts": 4, "experts_per_token": 2, "expert_dim": 48},
}

VARIANTS: dict[str, dict[str, Values]] = {
    "attention": {
        "qk-norm": {"qk_norm": True, "kv_heads": 2},
        "window": {"window": 5},
        # a layer that turns and sees all, one that does neither
        "patterns": {"rope_layers": ("on", "off"), "window": 5, "window_layers": ("off", "on"), "kv_heads": 2},
        # the first 8 of 12 features turn, stretched in one of two layers
        "parts": {
            **{"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_len": 1024, "rope_global_layers": ("off", "on")},
            **{"rope_dim": 8, "head_size": 12, "kv_heads": 2},
        },
        # 17 tokens, more than the original 8, turn by the second list
        "longrope": {
            **{"rope_scaling": "longrope", "rope_factor": 4.0, "rope_original_len": 8, "kv_heads": 2},
            **{"rope_short_factors": (1.0, 1.1, 1.3, 1.7), "rope_long_factors": (1.0, 1.5, 4.0, 9.0)},
        },
        "multipliers": {"embedding_multiplier": 2.5, "residual_multiplier": 0.7, "attention_multiplier": 0.2, "logits_divisor": 1.5},
        "post-norms": {"norms": "post", "qk_norm": True, "qk_norm_over": "all", "kv_heads": 2},
        "sandwich": {"norms": "sandwich"},
        "gate": {"attention_gate": True, "qk_norm": True, "qkv_bias": True, "head_size": 12, "kv_heads": 2},
        # heads of a size of their own, every bias, another head: 12 is no power of two
        "untied-biases-heads-of-12": {"tied_head": False, "qkv_bias": True, "o_bias": True, "head_size": 12, "kv_heads": 2},
    },
    "linear": {
        "no-decay": {"linear_decay": "none"},
        "fixed-decay": {"linear_decay": "fixed"},
        "denominator": {"linear_feature_map": "elu1", "linear_normalizer": "denominator"},
    },
    "ssm": {"two-groups": {"ssm_groups": 2}, "one-tap": {"ssm_expand": 1, "ssm_head_dim": 8, "conv_width": 1}},
    "mla": {
        "q-rank": {"mla_q_rank": 12},
        "odd-sizes": {"mla_kv_rank": 10, "mla_rope_dim": 6},
        # heads of a size of their own; what turns and what does not are scaled by factors of their own
        "heads-of-12-factors": {
            **{"head_size": 12, "rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_len": 1024},
            **{"rope_attention_factor": 1.1, "mla_plain_factor": 1.05},
        },
    },
    "block-sparse": {"three-blocks": {"block_size": 3, "block_topk": 3, "qk_norm": True}, "gate": {"attention_gate": True}},
    "rwkv": {"wide-heads": {"rwkv_head_dim": 16}},
    "gated-deltanet": {
        "one-tap": {"conv_width": 1},
        # three value heads of each key head, of other sizes than the model's heads and each other's
        "own-heads": {"delta_key_heads": 2, "delta_value_heads": 6, "delta_key_size": 10, "delta_value_size": 6},
    },
    "experts": {
        "bias": {"router": "bias"},
        "shared": {"shared_experts": 1},
        "shared-gate": {"shared_experts": 1, "shared_gate": True},
        "bias-shared-of-3": {"router": "bias", "shared_experts": 2, "experts_per_token": 3},
        "groups": {
            **{"experts": 6, "experts_per_token": 3, "expert_groups": 3, "expert_groups_per_token": 2},
            **{"norm_topk_prob": False, "routed_scaling_factor": 1.5},
        },
        "bias-groups": {"router": "bias", "expert_groups": 2, "routed_scaling_factor": 2.5, "shared_experts": 1},
    },
}
