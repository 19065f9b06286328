"""Values of a config.json at the edges of what they can be: written so that they are read back, or refused by name."""

import json
from pathlib import Path

import pytest

from convert.families import families_of
from convert.hf_config import from_hf, of_language, to_hf
from convert.hf_values import shortest
from smedjan_common.errors import CheckpointError, ConfigError
from smedjan_common.model import rope
from tests.unit.convert_models import NTK, YARN, convert, model_config, neutral, tokenizer

LATENT = {"mixer": ("mla",), "kv_heads": 4, "mla_kv_rank": 12, "mla_q_rank": 8, "mla_rope_dim": 4}


@pytest.mark.parametrize("plain", [0.0, 1.0, 1.2])
@pytest.mark.parametrize("turned", [0.5, 1.0, 1.05, 1.5])
def test_every_pair_of_factors_of_latent_attention_is_read_back_as_it_was(turned: float, plain: float):
    model = model_config(300, **LATENT, **YARN, rope_attention_factor=turned, mla_plain_factor=plain)
    if rope.plain_factor(model) < 1:
        with pytest.raises(ConfigError, match=r"rope_attention_factor = 0\.5 has no"):
            families_of(model, "Hugging Face")
        return
    back = from_hf(json.loads(json.dumps(to_hf(model, "float32", None))), "config.json")
    assert rope.attention_factor(back) == pytest.approx(turned, rel=1e-9)
    assert rope.plain_factor(back) == pytest.approx(plain or turned, rel=1e-9)


@pytest.mark.parametrize("more", [{"mla_plain_factor": 1.3}, YARN | {"mla_plain_factor": 0.5}], ids=["no yarn", "under 1"])
def test_a_factor_of_what_does_not_turn_that_no_program_reads_is_refused_by_name(more: dict):
    with pytest.raises(ConfigError, match="mla_plain_factor"):
        families_of(model_config(300, **LATENT, **more), "Hugging Face")


def test_notes_are_of_the_language_model_in_a_nested_configuration(tmp_path: Path, capsys: pytest.CaptureFixture):
    model = model_config(tokenizer().vocab_size, mixer=("gated-deltanet", "attention"), qk_norm=True, **NTK)
    convert(neutral(tmp_path, model), tmp_path / "hf", "--to", "hf")
    assert "NTK-aware scaling is written as the base it comes to" in capsys.readouterr().out


def test_what_mlx_lm_does_not_read_of_yarn_has_a_note(tmp_path: Path, capsys: pytest.CaptureFixture):
    for turned, noted in ((1.0, True), (1.5, False)):
        model = model_config(tokenizer().vocab_size, **LATENT, **YARN, rope_attention_factor=turned, mla_plain_factor=1.2)
        convert(neutral(tmp_path / str(turned), model), tmp_path / f"{turned}-hf", "--to", "hf")
        assert ("mlx-lm does not read its factor" in " ".join(capsys.readouterr().out.split())) is noted


def test_more_layers_than_any_model_has_are_refused_before_a_pattern_of_them_is_made():
    routed = {"mixer": ("mla",), "router": "bias", "ffn": ("swiglu", "experts"), "experts": 4, "expert_dim": 16}
    values = to_hf(model_config(300, **LATENT | routed), "float32", None)
    with pytest.raises(CheckpointError, match="promises 16777216 layers"):
        from_hf(values | {"num_hidden_layers": 1 << 24}, "config.json")


def test_the_shortest_pattern():
    assert shortest(("a", "b") * 3) == ("a", "b")
    assert shortest(("a", "b", "a")) == ("a", "b")
    assert shortest(("a", *("b",) * 5)) == ("a", *("b",) * 5)
    assert shortest(("a", *("b",) * 9999)) == ("a", *("b",) * 9999)


@pytest.mark.parametrize(("outer", "kind"), [({}, "some"), ({"model_type": None}, "some"), ({"model_type": "whole"}, "whole")])
def test_a_configuration_is_of_the_outer_type_or_where_that_is_silent_the_inner_one(outer: dict, kind: str):
    assert of_language(outer | {"text_config": {"model_type": "some_text"}})["model_type"] == kind


def test_a_type_that_is_no_name_is_refused():
    with pytest.raises(CheckpointError, match="a model of the type -1"):
        from_hf({"model_type": -1, "text_config": {"model_type": "qwen3_5_text"}}, "config.json")
