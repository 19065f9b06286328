"""The table of optimizers: which tensors muon takes, what each optimizer keeps, and the defaults that follow from a row."""

import numpy as np
import pytest

from smedjan_common.config import ModelConfig
from smedjan_common.errors import CheckpointError
from smedjan_common.model.ffns import FFNS
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.parameter import ParamSpec
from smedjan_common.model.params import parameter_table
from smedjan_common.run.asked import Asked
from smedjan_common.run.flags import TrainFlags, TrainingFlags
from smedjan_common.run.settings import train_config
from smedjan_common.training.config import default_lr
from smedjan_common.training.optimizers import OPTIMIZERS, check_state, slot_names
from tests.conformance.models import SMALL

TINY = ModelConfig.preset("tiny")
NO_MAPS = {"embed.weight", "mixer.conv.weight", "mixer.r_k"}  # of two dimensions, and yet not what Newton-Schulz is for


def model(mixer: str, ffn: str) -> ModelConfig:
    return ModelConfig.preset("tiny", mixer=(mixer,), ffn=(ffn,), **{**SMALL.get(mixer, {}), **SMALL.get(ffn, {})})


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("ffn", FFNS)
def test_matrices_are_the_linear_maps_between_hidden_features(mixer: str, ffn: str):
    for name, spec in parameter_table(model(mixer, ffn)).items():
        kind = name.split(".", 2)[2] if name.startswith("layers.") else name
        assert spec.matrix == (len(spec.shape) > 1 and kind not in NO_MAPS), name


def test_a_batch_of_maps_per_expert_is_a_matrix_and_a_vector_per_expert_is_none():
    assert ParamSpec("gate", (8, 64, 32), ("experts", "ffn", "embed")).matrix
    assert ParamSpec("router", (8, 32), ("experts", "embed")).matrix
    assert not ParamSpec("bias", (8,), ("experts",)).matrix
    assert not ParamSpec("scale", (8, 64, 32), (None, "ffn", "embed")).matrix


def test_each_optimizer_keeps_what_it_needs():
    table = parameter_table(TINY)
    matrices = [name for name, spec in table.items() if spec.matrix]
    rest = [name for name in table if name not in matrices]
    assert slot_names(TINY, "adamw") == {"mu": [*table], "nu": [*table]}
    assert slot_names(TINY, "muon") == {"mu": [*table], "nu": rest}
    assert slot_names(TINY, "lion") == {"mu": [*table]}
    assert OPTIMIZERS["adamw"].slots(table["norm.weight"]._replace(lr_scale=0.0)) == ()


def test_a_state_that_does_not_fit_is_described_by_name():
    table = parameter_table(TINY)
    state = {f"mu.{name}": np.zeros(spec.shape) for name, spec in table.items()}
    check_state(TINY, "lion", state)
    with pytest.raises(CheckpointError, match=r"--optimizer adamw: nu\.embed\.weight is missing; .* \(and \d+ more\)\."):
        check_state(TINY, "adamw", state)
    with pytest.raises(CheckpointError, match=r"nu\.norm\.weight is none of its arrays\."):
        check_state(TINY, "lion", {**state, "nu.norm.weight": np.zeros(128)})
    with pytest.raises(CheckpointError, match=r"mu\.norm\.weight has shape \(64,\), not \(128,\)\."):
        check_state(TINY, "lion", {**state, "mu.norm.weight": np.zeros(64)})


def test_defaults_follow_the_optimizer_and_given_flags_win():
    def made(**flags: object):
        return train_config(Asked(TrainFlags(training=TrainingFlags(steps=100, **flags)), frozenset(flags)), None, "lm", 128, 100)

    adamw, muon, lion = (made(optimizer=name) for name in ("adamw", "muon", "lion"))
    assert (adamw.lr, adamw.beta2, adamw.weight_decay) == (muon.lr, muon.beta2, muon.weight_decay) == (1.7e-3, 0.95, 0.1)
    assert (lion.lr, lion.beta2, lion.weight_decay) == (3.4e-4, 0.99, 0.5)
    given = made(optimizer="lion", lr=1e-3, beta2=0.9, weight_decay=0.0)
    assert (given.lr, given.beta2, given.weight_decay) == (1e-3, 0.9, 0.0)
    assert default_lr(128) == default_lr(128, "muon") == 1.7e-3
