"""`sizes`: exact counts."""

import json

import pytest

from smedjan_common.commands import sizes
from smedjan_common.config import ModelConfig
from smedjan_common.flops import train_flops_per_token
from smedjan_common.presets import PRESETS


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
    "words", [("--size", "tinny"), ("--size", "custom"), ("--dim", "64"), ("--dtype", "float8"), ("--vocab-size", "0")]
)
def test_wrong_use_is_exit_2(words, capsys):
    assert sizes.main(list(words)) == 2
    assert capsys.readouterr().err.startswith("error: ")
