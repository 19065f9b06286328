"""`--to gguf` and back in every architecture: llama.cpp, where it is installed, says the same, and the file reads back as the model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.gguf_forms import FORMS, form_of
from smedjan_common.checkpoint import read_checkpoint
from smedjan_common.errors import ConfigError
from tests.unit.convert_models import LLAMA3, YARN, convert, model_config, neutral, parameters, tokenizer
from tests.unit.llama_cpp import agrees

gguf = pytest.importorskip("gguf", reason="gguf is not installed (extra: gguf)")

EXPERTS = {"ffn": ("experts",), "experts": 4, "experts_per_token": 2, "expert_dim": 24}
ROUTED = {**EXPERTS, "ffn": ("swiglu", "experts"), "router": "bias", "qk_norm": True}  # after a dense layer
GROUPS = {"experts": 12, "experts_per_token": 3, "expert_groups": 4, "expert_groups_per_token": 2, "routed_scaling_factor": 2.5}
MULTIPLIED = {"embedding_multiplier": 3.0, "residual_multiplier": 0.22, "attention_multiplier": 0.2, "logits_divisor": 8.0}
POST = {"norms": "post", "qk_norm": True, "qk_norm_over": "all"}
FOURTH = ("on", "on", "on", "off")
LONGROPE = {
    **{"rope_scaling": "longrope", "rope_factor": 4.0, "rope_original_len": 32},
    **{"rope_short_factors": (1.0, 1.1, 1.3), "rope_long_factors": (1.0, 1.5, 4.0)},
}
MLA = {"mixer": ("mla",), "kv_heads": 4, "tied_head": False}
DELTA = {"mixer": ("gated-deltanet", "attention"), "qk_norm": True}
OWN = {"delta_key_heads": 3, "delta_value_heads": 6, "delta_key_size": 16, "delta_value_size": 16, "head_size": 12}
SSM = {"mixer": ("ssm", "attention"), "ssm_head_dim": 16, "ssm_state": 8}
# architecture, and what comes after it: a model
MODELS: dict[str, dict[str, Any]] = {
    "llama, experts": EXPERTS | {"tied_head": False},
    "qwen3moe": EXPERTS | {"qk_norm": True, "head_size": 12},
    "smollm3": {"layers": 4, "rope_layers": FOURTH, "head_size": 12},
    "phi3": {"rope_dim": 4, "tied_head": False},
    "phi3, longrope": LONGROPE | {"rope_dim": 6, "rope_attention_factor": 1.19},
    "phi3, longrope of whole heads": LONGROPE | {"rope_short_factors": (1.0, 1.1, 1.3, 1.7), "rope_long_factors": (1.0, 1.5, 4.0, 9.0)},
    "olmo2": POST | YARN,
    "olmo2, windows": POST | YARN | {"layers": 4, "window": 16, "window_layers": FOURTH, "rope_global_layers": ("off", "off", "off", "on")},
    "glm4moe": ROUTED | {"shared_experts": 1, "rope_dim": 4, "qkv_bias": True},
    "glm4moe, none shared": ROUTED | GROUPS | {"ffn": ("experts",), "tied_head": False},
    "arwkv7": {"mixer": ("rwkv",), "rwkv_head_dim": 8, "kv_heads": 4, "init_std": 0.1},
    "deepseek2": MLA | {"mla_q_rank": 12},
    "deepseek2, experts": MLA | EXPERTS | {"ffn": ("swiglu", "experts"), "router": "bias", "shared_experts": 1, "mla_q_rank": 12},
    "deepseek2, groups": MLA
    | EXPERTS
    | YARN
    | GROUPS
    | {"ffn": ("swiglu", "experts"), "router": "bias", "mla_q_rank": 12, "head_size": 12, "rope_attention_factor": 1.0625},
    "deepseek2, softmax": MLA
    | EXPERTS
    | YARN
    | {"norm_topk_prob": False, "routed_scaling_factor": 16.0, "mla_q_rank": 12, "tied_head": True},
    "olmoe": EXPERTS | POST | {"norms": "pre", "kv_heads": 4, "norm_topk_prob": False, "tied_head": False},
    "qwen35": DELTA | {"mixer": ("gated-deltanet", "gated-deltanet", "attention"), "layers": 3, "rope_dim": 4, "conv_width": 3},
    "qwen35, gates": DELTA | OWN | {"attention_gate": True, "rope_dim": 4},
    "qwen3next, gates": DELTA | OWN | EXPERTS | {"shared_experts": 2, "attention_gate": True, "shared_gate": True, "rope_dim": 4},
    "qwen3next": DELTA | EXPERTS | {"shared_experts": 1, "rope_dim": 4, "tied_head": False},
    "granite": MULTIPLIED | {"qkv_bias": True, "o_bias": True},
    "granite, not turned": {"rope_layers": ("off",), "tied_head": False},
    "granitemoe": EXPERTS | {"shared_experts": 2} | MULTIPLIED | LLAMA3 | {"dim": 64},
    "granitehybrid": SSM | MULTIPLIED | {"rope_layers": ("off",)},
    "granitehybrid, experts": SSM | EXPERTS | {"shared_experts": 1, "ssm_groups": 2, "tied_head": False},
}


def checkpoint(folder: Path, kind: str) -> Path:
    config = model_config(tokenizer().vocab_size, **MODELS[kind])
    assert form_of(config) == kind.split(",")[0]
    return neutral(folder, config, parameters(config))


def test_every_architecture_has_a_model():
    assert {kind.split(",")[0] for kind in MODELS} | {"llama", "qwen2", "qwen3"} == set(FORMS)


@pytest.mark.parametrize("kind", MODELS)
def test_llama_cpp_gives_the_same_probabilities_and_greedy_text(tmp_path: Path, kind: str):
    source = checkpoint(tmp_path, kind)
    convert(source, tmp_path / "m.gguf", "--to", "gguf")
    agrees(tmp_path / "m.gguf", source, tokenizer(), 1e-5, text_too=True)


@pytest.mark.parametrize("kind", MODELS)
def test_a_file_comes_back_as_the_model_that_was_written(tmp_path: Path, kind: str):
    source = checkpoint(tmp_path, kind)
    convert(source, tmp_path / "m.gguf", "--to", "gguf")
    convert(tmp_path / "m.gguf", tmp_path / "back", "--to", "neutral")
    before, after = read_checkpoint(source), read_checkpoint(tmp_path / "back")
    left_to_defaults = {"init_std", "ffn_dim", "mla_kv_rank", "mla_rope_dim"}
    fields = [{k: v for k, v in side.model.to_dict().items() if k not in left_to_defaults} for side in (before, after)]
    assert fields[0] == fields[1]
    for name, value in before.snapshot.params.items():
        found = after.snapshot.params[name]
        if name.endswith("A_log"):  # there it is -exp(A_log)
            assert np.allclose(found, value, rtol=1e-6, atol=1e-6), name
        else:
            assert np.array_equal(found, value), name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"window": 16}, "no sliding window in llama"),
        ({"qkv_bias": True, "window": 16}, "no sliding window in qwen2"),
        ({"qk_norm": True} | LLAMA3, "no RoPE scaled as llama3 in qwen3"),
        ({"rope_layers": ("on", "off")}, "every fourth does not"),
        (POST | {"window": 16, "window_layers": ("on", "off")}, "every fourth has none"),
        (POST | {"qkv_bias": True, "o_bias": True}, "no biases in olmo2"),
        (EXPERTS | {"qk_norm": True, "ffn": ("swiglu", "experts")}, "no dense layers between in qwen3moe"),
        (EXPERTS | POST | {"norms": "pre", "norm_topk_prob": False}, "no fewer key/value heads than heads in olmoe"),
        (EXPERTS | POST | {"norms": "pre", "kv_heads": 4}, "no weights of experts that add up to 1 in olmoe"),
        (EXPERTS | {"qk_norm": True, "norm_topk_prob": False}, "do not add up to 1 in qwen3moe"),
        (MLA | YARN | {"mla_q_rank": 8, "mla_plain_factor": 1.5}, "no factor of its own for what does not turn"),
        (
            MLA | EXPERTS | {"mla_q_rank": 8, "norm_topk_prob": False, "expert_groups": 2},
            "no groups of experts with the softmax router in deepseek2",
        ),
        (MLA, "no queries that are not compressed"),
        (DELTA | EXPERTS | {"mixer": ("attention", "gated-deltanet"), "shared_experts": 1}, "other than every so many"),
        (DELTA | {"delta_key_size": 4}, "differ in size"),
        (DELTA | {"qkv_bias": True, "o_bias": True}, "no biases in qwen35"),
        (DELTA | EXPERTS | {"ffn": ("swiglu", "experts"), "shared_experts": 1}, "no dense layers between"),
        ({"mixer": ("linear",), "kv_heads": 4}, "has no GGUF form"),
    ],
)
def test_what_llama_cpp_would_not_read_as_it_is_is_refused(changes: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        form_of(model_config(tokenizer().vocab_size, **changes))
