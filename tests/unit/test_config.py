"""Configurations: every refusal says what, why and what to do; what is accepted survives JSON."""

import dataclasses
import json
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smedjan_common.checkpoint import manifest
from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.errors import CheckpointError, ConfigError, flag
from smedjan_common.model.config import ffn_width, parse_pattern
from smedjan_common.model.json_fields import is_of, most
from smedjan_common.model.presets import PRESETS
from smedjan_common.model.shape import ROPE_SCALINGS
from smedjan_common.training.config import ATTENTION, DTYPES, GRADIENT_CHECKPOINTING, default_lr
from smedjan_common.training.optimizers import OPTIMIZERS
from smedjan_common.training.schedule import SCHEDULES

MODEL = {"vocab_size": 100, "dim": 64, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 128}
TRAIN = {"steps": 10, "batch_size": 8, "seq_len": 32, "lr": 1e-3}

LONGROPE = {"rope_scaling": "longrope", "rope_factor": 4.0, "rope_original_len": 256}
LONGROPE |= {"rope_short_factors": (1.0,) * 8, "rope_long_factors": (2.0,) * 8}

# what is changed -> a word of the message's what, a word of its fix
MODEL_REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    *[({name: 0}, f"{flag(name)} is 0", "positive") for name in (*MODEL, "context_length")],
    ({"dim": -64}, "--dim is -64", "positive"),
    ({"heads": 5, "kv_heads": 5}, "--dim 64 does not divide into --heads 5", "--heads 2 or 4"),
    ({"kv_heads": 3}, "--heads 4 does not divide into --kv-heads 3", "--kv-heads 2"),
    ({"kv_heads": 8}, "--kv-heads 8", "--kv-heads 4"),
    ({"heads": 64, "kv_heads": 64}, "1 features, an odd number", "even"),
    ({"rope_scaling": "yarm"}, "'yarm' is unknown", "yarn"),
    ({"rope_scaling": "yarn"}, "--rope-factor 1 does not extend", "--rope-factor 4"),
    ({"rope_scaling": "ntk", "rope_factor": 0.5}, "--rope-factor 0.5", "--rope-factor 4"),
    ({"rope_factor": 4.0}, "--rope-factor 4 would do nothing", "--rope-scaling yarn"),
    *[({"rope_base": value}, f"--rope-base is {value}", "default") for value in (math.nan, math.inf, -5.0, 0.0, 1.0, 1e300)],
    *[({"rope_scaling": "yarn", "rope_factor": value}, f"--rope-factor is {value}", "default") for value in (math.nan, math.inf, 1e300)],
    ({"rope_scaling": "yarn", "rope_factor": -4.0}, "--rope-factor -4 does not extend", "--rope-factor 4"),
    ({"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_len": -1}, "--rope-original-len is -1", "default"),
    ({"rope_low_freq_factor": 2.0}, "--rope-low-freq-factor would do nothing", "llama3"),
    ({"rope_scaling": "llama3", "rope_factor": 8.0, "rope_low_freq_factor": 4.0}, "--rope-low-freq-factor 4 is not under", "1 and 4"),
    ({"rope_scaling": "longrope", "rope_factor": 4.0}, "--rope-scaling longrope has 0 and 0 factors for 8 turned pairs", "yarn"),
    (
        {**LONGROPE, "rope_short_factors": (1.0,) * 7 + (0.0,)},
        "--rope-scaling longrope has factors that are not over 0",
        "Restore",
    ),
    ({**LONGROPE, "rope_original_len": 0}, "or no original context", "Restore"),
    ({"rope_attention_factor": 1.1}, "--rope-attention-factor 1.1 would do nothing", "yarn"),
    ({"head_size": 15}, "15 features, an odd number", "--head-size even"),
    ({"head_size": -2}, "--head-size is -2", "default"),
    *[
        (
            {"head_size": 32, "kv_heads": 4, "mixer": ("attention", mixer), "ssm_head_dim": 32},
            f"does not go with {mixer}",
            "--head-size out",
        )
        for mixer in ("linear", "ssm", "rwkv")
    ],
    (
        {"mixer": ("gated-deltanet",), "delta_value_heads": 5},
        "5 value heads of gated-deltanet do not divide into 2 groups",
        "--delta-key-heads 1",
    ),
    ({"mixer": ("gated-deltanet",), "delta_key_size": -1}, "--delta-key-size is -1", "default"),
    ({"ffn": ("experts",), "experts": 4, "shared_gate": True}, "--shared-gate would do nothing", "--shared-experts 1"),
    ({"qk_norm_over": "all"}, "--qk-norm-over all would do nothing", "--qk-norm"),
    ({"norms": "middle"}, "--norms 'middle' is unknown", "pre"),
    ({"rope_layers": ()}, "--rope-layers is empty", "on, off"),
    ({"rope_layers": ("on", "of")}, "--rope-layers 'of' is unknown", "off"),
    ({"rope_layers": ("off",), "rope_scaling": "yarn", "rope_factor": 4.0}, "yarn would do nothing", "none"),
    ({"rope_global_layers": ("on", "off")}, "--rope-global-layers on,off would do nothing", "--rope-scaling"),
    ({"rope_scaling": "yarn", "rope_factor": 4.0, "rope_global_layers": ("off",)}, "--rope-global-layers off would do nothing", "on"),
    ({"rope_dim": 3}, "--rope-dim is 3", "--rope-dim 2"),
    ({"rope_dim": 4096}, "--rope-dim is 4096", "whole heads turn"),
    ({"window_layers": ("on", "off")}, "--window-layers on,off would do nothing", "--window 1024"),
    ({"window": 8, "window_layers": ("off",)}, "--window-layers off would do nothing", "--window out"),
    ({"rope_original_len": 16}, "--rope-original-len 16 would do nothing", "--rope-scaling yarn"),
    *[
        ({"rope_scaling": "yarn", "rope_factor": 4.0, "kv_heads": 4, "mixer": mixer, "ssm_head_dim": 32}, "yarn would do nothing", "none")
        for mixer in (("rwkv",), ("ssm",), ("linear",), ("gated-deltanet", "rwkv"))
    ],
    *[({"init_std": value}, f"--init-std is {value}", "0.02") for value in (math.nan, math.inf, -0.02)],
    *[({"norm_eps": value}, f"--norm-eps is {value}", "default") for value in (math.nan, math.inf, -1e-5, 0.0)],
    *[({name: 10**400}, f"{flag(name)} is 1000", "smaller") for name in (*MODEL, "context_length", "window", "experts")],
    ({"mixer": ()}, "--mixer is empty", "attention"),
    ({"mixer": ("attenton",)}, "--mixer 'attenton' is unknown", "attention"),
    ({"ffn": ("swigloo",)}, "'swigloo' is unknown", "swiglu"),
]

TRAIN_REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    *[({name: 0}, f"--{name.replace('_', '-')} is 0", "default") for name in ("steps", "batch_size", "seq_len", "grad_accum")],
    *[({"lr": value}, "--lr is", "default") for value in (0.0, -1e-3, float("nan"), float("inf"))],
    ({"eps": 0.0}, "--eps is 0.0", ""),
    *[({name: 1.5}, f"--{name.replace('_', '-')} is 1.5", "default") for name in ("beta1", "beta2", "min_lr_ratio", "decay_fraction")],
    *[
        ({field.name: value}, f"--{field.name.replace('_', '-')} is {value}", "")
        for field in dataclasses.fields(TrainConfig)
        if field.type is float
        for value in (math.nan, math.inf, -math.inf)
    ],
    *[({name: 10**400}, f"--{name.replace('_', '-')} is 1000", "smaller") for name in (*TRAIN, "seed", "grad_accum") if name != "lr"],
    *[({name: -1}, f"--{name.replace('_', '-')} is -1", "default") for name in ("weight_decay", "clip_norm", "warmup", "seed")],
    ({"batch_size": 8, "grad_accum": 3}, "--batch-size 8 does not divide into --grad-accum 3", "--grad-accum 2"),
    ({"warmup": 11}, "--warmup 11 is longer than --steps 10", "--warmup"),
    ({"lr_schedule": "cosin"}, "--lr-schedule 'cosin' is unknown", "cosine"),
    ({"optimizer": "adam"}, "--optimizer 'adam' is unknown", "adamw"),
    ({"gradient_checkpointing": "dot"}, "--gradient-checkpointing 'dot' is unknown", "dots"),
    ({"dtype": "bf16"}, "--dtype 'bf16' is unknown", "bfloat16"),
    ({"attention": "flash"}, "--attention 'flash' is unknown", "fused"),
]


def refusal(config: ModelConfig | TrainConfig) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        config.validate()
    return caught.value


@pytest.mark.parametrize(("change", "what", "fix"), MODEL_REFUSALS, ids=lambda part: str(part))
def test_a_model_that_cannot_be_built_is_refused_with_what_why_and_fix(change: dict, what: str, fix: str):
    check_message(refusal(ModelConfig(**{**MODEL, **change})), what, fix)


@pytest.mark.parametrize(("change", "what", "fix"), TRAIN_REFUSALS, ids=lambda part: str(part))
def test_a_training_that_cannot_work_is_refused_with_what_why_and_fix(change: dict, what: str, fix: str):
    check_message(refusal(TrainConfig(**{**TRAIN, **change})), what, fix)


def check_message(error: ConfigError, what: str, fix: str) -> None:
    assert error.exit_code == 2
    assert what in error.what, error.what
    assert fix in error.fix, error.fix
    for sentence in (error.what, error.why, error.fix):
        assert sentence.endswith((".", "?")), f"not a sentence: {sentence!r}"


@pytest.mark.parametrize("size", PRESETS)
def test_every_preset_is_valid(size: str):
    config = ModelConfig.preset(size)
    config.validate()
    assert (config.dim, config.layers, config.heads, config.kv_heads) == (*PRESETS[size], PRESETS[size].heads)
    assert config.ffn_dim % 256 == 0


def test_an_unknown_size_names_the_near_ones():
    with pytest.raises(ConfigError, match="medium"):
        ModelConfig.preset("medum")


@pytest.mark.parametrize("multiple", [0, -1.0, math.nan, math.inf, -math.inf, 1e300])
def test_a_feed_forward_without_width_is_refused(multiple: float):
    for make in (lambda: ModelConfig.preset("tiny", ffn_mult=multiple), lambda: ffn_width(64, multiple)):
        with pytest.raises(ConfigError, match=f"--ffn-mult is {re.escape(str(multiple))}"):
            make()


@pytest.mark.parametrize(
    ("change", "what", "fix"),
    [
        ({"mixer": ("ssm", "ssm", "ssm", "attention")}, "--mixer names 4 layers, of which the model has only 2", "--layers 4"),
        ({"ffn": ("swiglu", "swiglu", "experts"), "experts": 4}, "--ffn names 3 layers, of which the model has only 2", "--layers 3"),
        ({"layers": 100_000_000}, "--layers is 100000000", "fewer"),
        ({"layers": 1025}, "--layers is 1025", "fewer"),
        ({"dim": 10**400}, "--dim is 1000", "smaller"),
        ({"init_std": 0.0}, "--init-std is 0", "0.02"),
    ],
    ids=str,
)
def test_a_new_model_that_would_not_be_what_was_asked_for_is_refused(change: dict, what: str, fix: str):
    with pytest.raises(ConfigError) as caught:
        ModelConfig.preset("tiny", **{"layers": 2, **change})
    check_message(caught.value, what, fix)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": "yarn", "rope_factor": 4.0, "mixer": ["rwkv"], "kv_heads": 4},
        {"rope_original_len": 16},
        {"rope_base": 0.5, "mixer": ["ssm"], "ssm_head_dim": 32, "kv_heads": 4},
        {"mixer": ["attention", "attention", "mla"]},
        {"init_std": 0.0},
    ],
    ids=str,
)
def test_a_stored_model_with_a_setting_that_did_nothing_stays_readable(change: dict):
    read = ModelConfig.from_dict({**MODEL, **change})
    stored = json.loads(json.dumps(read.to_dict()))
    assert {name: stored[name] for name in change} == json.loads(json.dumps(change))


def test_flags_and_checkpoints_refuse_the_same_numbers():
    for config in (ModelConfig(**MODEL), TrainConfig(**TRAIN)):
        for field in dataclasses.fields(config):
            if field.type is int:
                limit = most(field.name)
                refused = refusal(dataclasses.replace(config, **{field.name: limit + 1}))
                assert refused.what == f"{flag(field.name)} is {limit + 1}."
                for value, fits in ((limit, True), (limit + 1, False)):
                    assert is_of(int, value, most(field.name)) == fits
                with pytest.raises(CheckpointError, match=rf"{field.name} is {limit + 1}"):
                    manifest.checked_config(type(config), config.to_dict() | {field.name: limit + 1})


@pytest.mark.parametrize(("config", "values"), [(ModelConfig(**MODEL), MODEL), (TrainConfig(**TRAIN), TRAIN)], ids=["model", "train"])
def test_a_configuration_survives_json(config: ModelConfig | TrainConfig, values: dict):
    written = json.loads(json.dumps(config.to_dict()))
    assert type(config).from_dict(written) == config
    assert {name: written[name] for name in values} == values
    first = next(iter(values))
    with pytest.raises(ConfigError, match=f"no field '{first}x'.*{first}"):
        type(config).from_dict({**written, f"{first}x": 1})
    with pytest.raises(ConfigError, match=f"lacks the field '{first}'"):
        type(config).from_dict({name: value for name, value in written.items() if name != first})


def test_reading_a_configuration_validates_it():
    with pytest.raises(ConfigError, match="--dim"):
        ModelConfig.from_dict({**MODEL, "heads": 5})


def test_configurations_are_frozen_and_hashable():
    for config in (ModelConfig(**MODEL), TrainConfig(**TRAIN)):
        hash(config)
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.seed = 1  # type: ignore[misc]


@given(st.integers(1, 10**6))
def test_the_padded_vocabulary_is_the_next_multiple_of_64(vocab: int):
    padded = dataclasses.replace(ModelConfig(**MODEL), vocab_size=vocab).padded_vocab_size
    assert padded % 64 == 0
    assert 0 <= padded - vocab < 64


def test_patterns_repeat_over_the_depth():
    config = dataclasses.replace(ModelConfig(**MODEL), mixer=("a", "a", "b"), ffn=("x", "y"))
    assert [config.mixer_of(layer) for layer in range(7)] == ["a", "a", "b", "a", "a", "b", "a"]
    assert [config.ffn_of(layer) for layer in range(3)] == ["x", "y", "x"]
    assert parse_pattern("ssm, ssm,attention,") == ("ssm", "ssm", "attention")


@pytest.mark.parametrize(("dim", "width"), [(128, 512), (256, 768), (512, 1536), (1024, 2816), (4096, 11008)])
def test_the_feed_forward_is_the_multiple_rounded_up_to_256(dim: int, width: int):
    assert ffn_width(dim, 2.67) == width


@pytest.mark.parametrize(("dim", "lr"), [(128, 1.7e-3), (512, 8.5e-4), (4096, 3e-4)])
def test_the_default_learning_rate_falls_with_the_root_of_the_width(dim: int, lr: float):
    assert default_lr(dim) == lr


def test_the_menus_of_names_are_what_the_fields_accept():
    for field, names in (
        ("optimizer", OPTIMIZERS),
        ("gradient_checkpointing", GRADIENT_CHECKPOINTING),
        ("dtype", DTYPES),
        ("attention", ATTENTION),
        ("lr_schedule", SCHEDULES),
    ):
        for name in names:
            TrainConfig(**TRAIN, **{field: name}).validate()
        other = f"{name}-2"
        refused = refusal(TrainConfig(**TRAIN, **{field: other}))
        assert refused.what == f"--{field.replace('_', '-')} {other!r} is unknown."
        assert refused.fix == f"Choose one of {', '.join(names)}."
    for scaling in ROPE_SCALINGS:
        stretched = LONGROPE if scaling == "longrope" else {"rope_scaling": scaling, "rope_factor": 1.0 if scaling == "none" else 2.0}
        ModelConfig(**MODEL | stretched).validate()


def test_a_layer_has_what_the_patterns_say_of_it_and_a_file_from_before_them_is_read():
    config = ModelConfig(**{**MODEL, "layers": 5, "window": 8, "window_layers": ("on", "on", "off"), "rope_layers": ("on", "off")})
    config.validate()
    assert [config.at(layer).window for layer in range(5)] == [8, 8, 0, 8, 8]
    assert [config.at(layer).rope_layers[0] for layer in range(5)] == ["on", "off", "on", "off", "on"]
    assert ModelConfig.from_dict(config.to_dict()) == config
    old = {name: value for name, value in ModelConfig(**MODEL).to_dict().items() if name not in ("window_layers", "rope_layers")}
    assert ModelConfig.from_dict(old) == ModelConfig(**MODEL)
    assert ModelConfig(**MODEL).at(3) == ModelConfig(**MODEL)


def test_a_pattern_longer_than_the_model_is_refused():
    with pytest.raises(ConfigError, match="--window-layers names 3 layers, of which the model has only 2"):
        ModelConfig.build(vocab_size=64, dim=32, layers=2, heads=4, window=4, window_layers=("on", "on", "off"))
