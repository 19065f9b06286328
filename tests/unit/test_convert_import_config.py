"""What config.json may say for `--to neutral`: each generation's way is read; what cannot be expressed or is wrong is refused by name."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from convert import hf_import
from convert.hf_rope import rope_from_hf
from smedjan_common.config import ModelConfig
from smedjan_common.errors import SmedjanError
from smedjan_common.model.rope import attention_factor
from tests.unit.convert_models import YARN, model_config, tokenizer
from tests.unit.hf_directories import change, refusal

SCALED = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {"type": "longrope", "factor": 4.0, "short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [1.0, 1.5, 4.0, 9.0]}
INEXPRESSIBLE = {
    "activation": ({"hidden_act": "gelu"}, "the activation 'gelu'"),
    "type": ({"model_type": "gpt2"}, "of the type 'gpt2'"),
    "near type": ({"model_type": "qwen"}, "These are read: llama, qwen2"),
    "layers that are not there": ({"layer_types": ["full_attention"]}, "1 layer_types"),
    "rope of a layer that is not said": ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers [1]"),
    "layers": ({"layer_types": ["full_attention", "chunked_attention"]}, "'chunked_attention'"),
    "window of some layers": ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 9}, "9 positions in 1 of 2"),
    "traditional rope": ({"rope_traditional": True}, "rope_traditional"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "quantised weights"),
    "longrope": ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "RoPE of the type 'longrope'"),
    "dynamic rope": ({"rope_scaling": None, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "RoPE of the type 'dynamic'"),
    "partial rope": ({"partial_rotary_factor": 0.5}, "partial rotary"),
    "odd part of a head": ({"model_type": "glm4_moe", "partial_rotary_factor": 0.4}, "partial_rotary_factor 0.4"),
    "longrope of a phi": (
        {"model_type": "phi3", "rope_scaling": {"type": "longrope", "long_factor": [1.0]}},
        "no short_factor of numbers",
    ),
    "longrope of another number of pairs": ({"model_type": "phi3", "rope_scaling": {**LONGROPE, "long_factor": [1.0]}}, "4 and 1 factors"),
    "longrope with factors of short texts": ({"model_type": "phi3", "rope_scaling": {**LONGROPE, "short_mscale": 1.1}}, "short_mscale"),
    "longrope of two lengths": (
        {"model_type": "phi3", "rope_scaling": {**LONGROPE, "original_max_position_embeddings": 32}},
        "twice, as 32 and 4096",
    ),
    "olmo3 with two bases": (
        {"model_type": "olmo3", "rope_parameters": {"sliding_attention": {"rope_theta": 2e4}}},
        "a base of its own",
    ),
    # transformers gives such layers 500000 then, mlx-lm the base that is there
    "olmo3 with a base that is not for all layers": ({"model_type": "olmo3", "rope_theta": 2e4, "rope_parameters": None}, "of its own"),
    "olmo3 with flat rope": ({"model_type": "olmo3", "rope_parameters": {"rope_type": "yarn"}}, "not of its layer_types"),
    "yarn beta": ({"rope_parameters": SCALED | {"beta_fast": 16}}, "YaRN with beta_fast 16"),
    "yarn factor": ({"rope_parameters": SCALED | {"attention_factor": 1.0}}, "YaRN with attention_factor 1"),
    "yarn mscale": ({"rope_parameters": SCALED | {"mscale": 1.0, "mscale_all_dim": 1.0}}, "mscale_all_dim"),
    "yarn untruncated": ({"rope_parameters": SCALED | {"truncate": False}}, "truncation"),
    "groups": ({"num_key_value_heads": 3}, "--kv-heads 3"),
}


@pytest.mark.parametrize("case", INEXPRESSIBLE)
def test_what_the_model_cannot_express_is_refused_by_name(hf: Path, case: str):
    values, words = INEXPRESSIBLE[case]
    change(hf, "config.json", **values)
    assert words in refusal(hf)


def test_the_length_before_yarn_may_stand_beside_it_and_two_lengths_are_refused(hf: Path):
    """At the top of config.json, as transformers 5 takes it; in the scaling; in both."""
    scaling = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    for keys in ({"rope_parameters": scaling, "rope_scaling": None}, {"rope_parameters": None, "rope_scaling": scaling}):
        change(hf, "config.json", original_max_position_embeddings=32, **keys)
        assert hf_import.read(hf).config.rope_original_len == 32
    change(hf, "config.json", rope_scaling=scaling | {"original_max_position_embeddings": 64})
    assert "twice, as 32 and 64" in refusal(hf)


@pytest.mark.parametrize(("said", "factor"), [({}, 1.0), ({"factor": 4.0}, (1 + math.log(4) / math.log(128)) ** 0.5)])
def test_a_longrope_that_does_not_stretch_multiplies_nothing(said: dict[str, float], factor: float):
    """As transformers has it where a context is the original one, and no factor is said."""
    values = {"original_max_position_embeddings": 128, "rope_scaling": {**LONGROPE, "factor": None} | said}
    found = rope_from_hf(values, "config.json", 128, 8, "phi3")
    config = ModelConfig(vocab_size=64, dim=16, layers=1, heads=2, kv_heads=2, ffn_dim=16, context_length=128, **found)
    config.validate()
    assert attention_factor(config) == pytest.approx(factor, rel=1e-12)


def test_a_null_in_what_is_said_of_rope_hides_no_value_of_the_file():
    """Half of a head turned would become all of it, without a word."""
    values = {"partial_rotary_factor": 0.5, "rope_theta": 5e4, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": None}}
    found = rope_from_hf({**values, "max_position_embeddings": 64}, "config.json", 64, 8, "phi3")
    assert (found["rope_dim"], found["rope_base"]) == (4, 5e4)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hidden_size": "32"}, "hidden_size '32'"),
        ({"hidden_size": -32}, "hidden_size -32"),
        ({"hidden_size": None}, "hidden_size None"),
        ({"num_hidden_layers": True}, "num_hidden_layers True"),
        ({"num_hidden_layers": 10_000_000}, "promises 10000000 layers"),
        ({"num_hidden_layers": 3}, "layers.2."),
        ({"num_hidden_layers": 1}, "layers.1."),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"vocab_size": 256}, "has shape (320, 32)"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps"),
        ({"rope_theta": float("nan"), "rope_parameters": None}, "rope_theta"),
        ({"rope_scaling": [1], "rope_parameters": None}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": None}}, "factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0.5}}, "--rope-factor 0.5"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 9}, "odd number"),
        ({"num_attention_heads": 3}, "--kv-heads 2"),
        ({"num_attention_heads": 32, "head_dim": 1, "num_key_value_heads": 16}, "odd number"),
        ({"layer_types": 7}, "config.json cannot be used"),
        ({"model_type": "mistral", "sliding_window": "x"}, "sliding_window 'x'"),
    ],
)
def test_a_wrong_configuration_is_refused_with_what_is_wrong(hf: Path, values: dict, words: str):
    change(hf, "config.json", **values)
    said = refusal(hf)
    assert words in said


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff", '{"model_type": "llama"}', "[" * 100_000])
def test_a_configuration_that_is_none_is_refused(hf: Path, text: str):
    (hf / "config.json").write_text(text, encoding="latin-1")
    said = refusal(hf)
    assert str(hf / "config.json") in said
    assert "no format" not in said


def test_a_directory_with_a_wrong_configuration_is_not_what_force_may_replace(hf: Path, tmp_path: Path):
    (hf / "config.json").write_text("{}")
    assert "of the type None" in refusal(hf)
    assert not hf_import.detect(hf)


def test_reading_raises_only_errors_of_ours(hf: Path):
    change(hf, "config.json", hidden_size=[])
    with pytest.raises(SmedjanError):
        hf_import.read(hf)


@pytest.mark.parametrize(("sliding", "window"), [(16, 16), (127, 127), (128, 0), (4096, 0), (None, 0)])
def test_the_sliding_window_of_mistral_is_the_window(hf: Path, sliding: int | None, window: int):
    document = json.loads((hf / "config.json").read_text()) | {"model_type": "mistral", "sliding_window": sliding}
    (hf / "config.json").write_text(json.dumps(document))
    assert hf_import.read(hf).config.window == window
    change(hf, "config.json", sliding_window=None, max_position_embeddings=8192)  # left out: what transformers takes
    assert hf_import.read(hf).config.window == 4096


def test_yarn_is_read_from_either_generation(hf: Path):
    """rope_parameters alone (transformers 5), rope_scaling alone (4), its older key `type`, the length left to the context."""
    config = model_config(tokenizer().vocab_size, **YARN)
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32}
    for keys in (
        {"rope_scaling": None, "rope_theta": None, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, **scaling}},
        {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", **scaling}},
        {"rope_parameters": None, "rope_scaling": {"type": "yarn", **scaling, "attention_factor": 0.1 * np.log(4.0) + 1}},
    ):
        change(hf, "config.json", **keys)
        assert hf_import.read(hf).config == config
    change(hf, "config.json", rope_scaling={"type": "yarn", "factor": 4.0})
    assert hf_import.read(hf).config.rope_original_len == 128
