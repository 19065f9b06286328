"""The rows of linear and ssm: what they refuse, with a fix that works; what they count; what their decode state holds."""

from typing import Any

import numpy as np
import pytest

from smedjan_common.config import ModelConfig
from smedjan_common.errors import ConfigError
from smedjan_common.model.flops import forward_flops_per_token
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.mixers.linear import fixed_log_decay
from smedjan_common.model.params import parameter_table


def model(*mixer: str, **changes: Any) -> ModelConfig:
    return ModelConfig.build(**{"vocab_size": 64, "dim": 64, "layers": len(mixer), "heads": 4, "mixer": mixer, **changes})


REFUSED: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {  # mixer, options, words of the fix, the options it leads to
    "unknown decay": ("linear", {"linear_decay": "scaler"}, "scalar", {"linear_decay": "scalar"}),
    "unknown feature map": ("linear", {"linear_feature_map": "elu"}, "elu1", {"linear_feature_map": "elu1"}),
    "unknown normaliser": ("linear", {"linear_normalizer": "rms"}, "rmsnorm", {"linear_normalizer": "rmsnorm"}),
    "denominator of any sign": (
        "linear",
        {"linear_normalizer": "denominator"},
        "--linear-feature-map elu1",
        {"linear_feature_map": "elu1"},
    ),
    "groups of heads": ("linear", {"kv_heads": 3}, "--kv-heads 2", {"kv_heads": 2}),
    "no taps": ("ssm", {"conv_width": 0}, "default", {"conv_width": 4}),
    "no state": ("ssm", {"ssm_state": 0}, "default", {"ssm_state": 128}),
    "heads of ssm": ("ssm", {"ssm_head_dim": 60}, "--ssm-head-dim 64", {"ssm_head_dim": 64}),
    "groups of ssm": ("ssm", {"ssm_groups": 3}, "--ssm-groups 2", {"ssm_groups": 2}),
    "key/value heads of ssm": ("ssm", {"kv_heads": 2}, "--ssm-groups 2", {"kv_heads": 4, "ssm_groups": 2}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_with_a_fix_that_works(case: str):
    mixer, options, words, fixed = REFUSED[case]
    with pytest.raises(ConfigError) as refusal:
        model(mixer, **options)
    assert words in refusal.value.fix
    model(mixer, **{**options, **fixed})


def test_ssm_leaves_key_value_heads_to_the_attention_beside_it():
    assert model("ssm", "attention", kv_heads=2).kv_heads == 2


@pytest.mark.parametrize("mixer", ["linear", "ssm"])
def test_cost_per_token_and_decode_state_do_not_grow_with_the_length(mixer: str):
    config = model(mixer)
    assert forward_flops_per_token(config, 128) == forward_flops_per_token(config, 131072)
    assert MIXERS[mixer].state(config, 1, 128) == MIXERS[mixer].state(config, 1, 131072)


def test_flops_are_those_of_the_recurrence():
    """Two per entry of the state for what is added and two for what is read; grouped heads read a state several times."""
    assert MIXERS["linear"].flops(model("linear"), 1) == 4 * 4 * 16 * 16
    assert MIXERS["linear"].flops(model("linear", kv_heads=2), 1) == 2 * (2 + 4) * 16 * 16
    assert MIXERS["ssm"].flops(model("ssm", ssm_state=32), 1) == 4 * 128 * 32


@pytest.mark.parametrize("mixer", ["linear", "ssm"])
def test_only_matrices_and_convolutions_decay(mixer: str):
    for spec in parameter_table(model(mixer)).values():
        assert spec.decay == (len(spec.shape) == 2), spec.name


def test_fixed_decays_are_retnets():
    np.testing.assert_allclose(fixed_log_decay(model("linear", linear_decay="fixed")), np.log(1 - 2.0 ** -np.arange(5, 9)), rtol=1e-12)
