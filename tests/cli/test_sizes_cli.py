"""`sizes`: exact counts."""

import json

import pytest

from smedjan_common.commands import sizes
from smedjan_common.config import ModelConfig
from smedjan_common.inference.memory import state_bytes
from smedjan_common.model.flops import train_flops_per_token
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.presets import PRESETS


def rows(capsys, *words):
    assert sizes.main([*words, "--json"]) == 0
    return {row["size"]: row for row in json.loads(capsys.readouterr().out)}


def test_every_preset_has_its_exact_count(capsys):
    found = rows(capsys, "--vocab-size", "8192")
    assert list(found) == list(PRESETS)
    assert found["tiny"]["parameters"] == 2_098_304
    assert found["medium"]["parameters"] == 45_101_568
    assert round(found["max"]["parameters"] / 1e9, 1) == 6.5


def test_the_table_shows_the_same(capsys):
    assert sizes.main(["--vocab-size", "8192"]) == 0
    out = capsys.readouterr().out
    assert "45,101,568" in out
    assert all(name in out for name in PRESETS)


@pytest.mark.parametrize("words", [(), ("--experts", "64", "--seq-len", "131072", "--vocab-size", "262144")])
def test_the_table_has_the_decode_state_and_fits_120_columns(words, capsys):
    assert sizes.main(list(words)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "state" in lines[0].split()
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_decode_state_is_that_of_the_context_and_the_dtype(dtype, capsys):
    [row] = rows(capsys, "--size", "tiny", "--seq-len", "1024", "--dtype", dtype, "--mixer", "ssm,attention").values()
    model = ModelConfig.preset("tiny", mixer=("ssm", "attention"), context_length=1024)
    assert row["decode_state_bytes"] == state_bytes(model, 1, 1024, dtype)


@pytest.mark.parametrize("option", [(mixer.name, name) for mixer in MIXERS.values() for name in mixer.own], ids="-".join)
def test_every_option_of_a_mixer_counts(option, capsys):
    mixer, name = option
    value = getattr(ModelConfig.preset("tiny"), name)
    switch, name_of_flag = value is False, f"--{name.replace('_', '-')}"
    text = ",".join(value) if isinstance(value, tuple) else str(value or 4)
    words = [name_of_flag] if switch else [name_of_flag, text]
    [row] = rows(capsys, "--size", "tiny", "--mixer", mixer, "--seq-len", "512", *words).values()
    changed = {name: True if switch else value or 4}
    model = ModelConfig.preset("tiny", mixer=(mixer,), context_length=512, **changed)
    assert row["parameters"] == model.num_params()
    assert row["train_flops_per_token"] == train_flops_per_token(model, 512)
    assert row["decode_state_bytes"] == state_bytes(model, 1, 512, "bfloat16")


def test_options_of_mixers_and_experts_count(capsys):
    [row] = rows(capsys, "--size", "tiny", "--mixer", "block-sparse", "--seq-len", "32", "--block-size", "2").values()
    assert row["parameters"] > 0
    [row] = rows(capsys, "--size", "tiny", "--mixer", "ssm", "--ssm-state", "16").values()
    assert row["parameters"] == ModelConfig.preset("tiny", mixer=("ssm",), ssm_state=16).num_params()
    [row] = rows(capsys, "--size", "tiny", "--ffn", "swiglu,experts", "--experts", "4", "--router", "bias").values()
    model = ModelConfig.preset("tiny", ffn=("swiglu", "experts"), experts=4, router="bias")
    assert row["parameters"] == model.num_params()


def test_part_of_a_shape_without_a_size_is_refused_with_what_to_add(capsys):
    assert sizes.main(["--heads", "3"]) == 2
    err = capsys.readouterr().err
    assert "--heads is given without --size" in err
    assert "--dim and --layers" in err
    assert "lacks" not in err


def test_custom_and_overridden_sizes(capsys):
    [row] = rows(
        capsys, "--size", "custom", "--dim", "64", "--layers", "2", "--heads", "4", "--kv-heads", "2", "--vocab-size", "300"
    ).values()
    model = ModelConfig.build(vocab_size=300, dim=64, layers=2, heads=4, kv_heads=2)
    assert row["parameters"] == model.num_params()
    assert row["train_flops_per_token"] == train_flops_per_token(model, 512)
    [row] = rows(capsys, "--size", "tiny", "--layers", "8").values()
    assert (row["dim"], row["layers"]) == (128, 8)


@pytest.mark.parametrize(
    "words",
    [
        ("--size", "tinny"),
        ("--size", "custom"),
        ("--dim", "64"),
        ("--dtype", "float7"),
        ("--vocab-size", "0"),
        ("--ssm-state", "16"),
        ("--experts-per-token", "4"),
    ],
)
def test_wrong_use_is_exit_2(words, capsys):
    assert sizes.main(list(words)) == 2
    assert capsys.readouterr().err.startswith("error: ")
