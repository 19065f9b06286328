"""Adapters to and from the directories of PEFT and mlx-lm: what these programs make of ours, and what we make of theirs, is the same model.

tests/fixtures/peft was written by PEFT 0.21.2 beside BASE (its logits are in logits.json), with other ranks and scales in some maps.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from convert import cli
from smedjan_common.backend import Snapshot
from smedjan_common.checkpoint import (
    ADAPTER,
    About,
    AdapterRecord,
    BaseWeights,
    read_info,
    read_weights,
    weights_hash,
    write_checkpoint,
    write_final,
)
from smedjan_common.config import ModelConfig
from smedjan_common.model.adapters import Adapters, adapter_table
from smedjan_common.model.params import initial_params
from smedjan_common.reference import model as reference
from tests.fakes.runs import ROOT

BASE = ModelConfig(vocab_size=64, dim=16, layers=2, heads=4, kv_heads=2, ffn_dim=24, context_length=32)
TOKENS = np.array([[3, 9, 27, 17, 51, 25, 11, 33]])
ADAPTERS = Adapters(3, 12.0, ("q_proj", "v_proj", "ffn.down_proj"))


def weights(config: ModelConfig) -> dict[str, np.ndarray]:
    """Larger than the first of a run, so that a difference shows in the logits."""
    return {name: 3 * value if value.ndim == 2 else value for name, value in initial_params(config, 5).items()}


def logits(params: dict[str, np.ndarray]) -> np.ndarray:
    return reference.forward(BASE, {name: value.astype(np.float64) for name, value in params.items()}, TOKENS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base, the same as a Hugging Face directory, and a checkpoint of adapters that have learned something."""
    folder = tmp_path_factory.mktemp("adapters")
    write_final(folder / "base", Snapshot(0, weights(BASE), {}), About(model=BASE, framework={"name": "test"}))
    base, rng = read_info(folder / "base" / "final"), np.random.default_rng(1)
    learned = {name: rng.normal(0, 0.3, spec.shape).astype(np.float32) for name, spec in adapter_table(BASE, ADAPTERS).items()}
    record = AdapterRecord(ADAPTERS, BaseWeights.at(base.path, folder / "lora", weights_hash(base)))
    write_checkpoint(
        folder / "lora",
        Snapshot(0, learned, {}),
        About(model=BASE, framework={"name": "test"}, extra={ADAPTER: record.to_json()}),
        name="final",
    )
    convert(folder / "base", folder / "hf", "--to", "hf")
    for kind in ("peft", "mlx-lm"):
        convert(folder / "lora", folder / kind, "--to", kind)
    return folder


def convert(*words: object) -> None:
    assert cli.main([str(word) for word in words]) == 0


def expected(folder: Path) -> np.ndarray:
    return logits(read_weights(read_info(folder / "lora" / "final"), None))


def test_adapters_change_the_model(folder):
    assert np.abs(expected(folder) - logits(weights(BASE))).max() > 0.1


@pytest.mark.oracle
def test_mlx_lm_makes_the_same_model_of_ours(folder):
    utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed (extra: oracle)")
    import mlx.core as mx
    from mlx_lm.tuner.utils import load_adapters

    model = load_adapters(utils.load_model(folder / "hf")[0], str(folder / "mlx-lm"))
    assert np.abs(np.array(model(mx.array(TOKENS)))[..., :64] - expected(folder)[..., :64]).max() < 1e-5


@pytest.mark.oracle
def test_peft_makes_the_same_model_of_ours(folder):
    peft = pytest.importorskip("peft", reason="peft is not installed; tests/fixtures/peft holds what it wrote")
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(folder / "hf"), str(folder / "peft"))
    with torch.no_grad():
        found = model(torch.tensor(TOKENS)).logits.numpy()
    assert np.abs(found[..., :64] - expected(folder)[..., :64]).max() < 1e-5


@pytest.mark.parametrize("kind", ["peft", "mlx-lm"])
def test_there_and_back_is_the_same_checkpoint(folder, tmp_path, kind):
    convert(folder / kind, tmp_path / "back", "--to", "neutral", "--base", folder / "base")
    ours, again = (read_info(path) for path in (folder / "lora" / "final", tmp_path / "back"))
    assert again.adapter
    assert (again.adapter.adapters.rank, again.adapter.adapters.alpha) == (3, 12.0)
    assert again.weights.keys() == ours.weights.keys()
    for name, value in read_weights(again, None).items():
        assert np.array_equal(value, read_weights(ours, None)[name]), name


def test_what_peft_wrote_with_several_ranks_and_scales_gives_its_logits(folder, tmp_path):
    convert(ROOT / "tests/fixtures/peft", tmp_path / "theirs", "--to", "neutral", "--base", folder / "base")
    found = logits(read_weights(read_info(tmp_path / "theirs"), None))
    stored = np.array(json.loads((ROOT / "tests/fixtures/peft/logits.json").read_text()))
    assert np.abs(found[..., :64] - stored).max() < 1e-5
    assert np.abs(found - logits(weights(BASE))).max() > 0.1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"use_dora": True}, "has use_dora."),
        ({"bias": "all"}, "has bias."),
        ({"peft_type": "IA3"}, "holds adapters of the kind IA3."),
        ({"r": 5}, "has an adapter of rank 3"),
        ({"lora_alpha": "much"}, "says a scale of much."),
        ({"rank_pattern": {"(q|v)_proj": 3}}, "has the pattern"),
    ],
)
def test_adapters_that_are_more_than_a_and_b_are_refused(folder, tmp_path, capsys, change, told):
    shutil.copytree(folder / "peft", tmp_path / "odd")
    values = json.loads((tmp_path / "odd/adapter_config.json").read_text()) | change
    (tmp_path / "odd/adapter_config.json").write_text(json.dumps(values))
    assert cli.main([str(tmp_path / "odd"), str(tmp_path / "out"), "--to", "neutral", "--base", str(folder / "base")]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_says_what_to_do(folder, tmp_path, capsys):
    other = ModelConfig(vocab_size=64, dim=16, layers=1, heads=4, kv_heads=2, ffn_dim=24, context_length=32)
    write_final(tmp_path / "other", Snapshot(0, weights(other), {}), About(model=other, framework={"name": "test"}))
    for words, told in (
        ([folder / "base", tmp_path / "out", "--to", "peft"], "holds a whole model."),
        ([folder / "peft", tmp_path / "out", "--to", "hf"], "They are no model by themselves."),
        ([folder / "peft", tmp_path / "out", "--to", "neutral", "--base", tmp_path / "other"], "model.layers.1.mlp.down_proj"),
        ([folder / "base", tmp_path / "out", "--to", "hf", "--base", folder / "base"], "--base would do nothing."),
    ):
        assert cli.main([str(word) for word in words]) == 2
        assert told in capsys.readouterr().err
