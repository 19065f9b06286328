"""Options: one definition gives field, JSON, flag, default, help, choices and bounds; one walk checks them for all rows."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import pytest
import tyro

from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.errors import ConfigError, nearest_divisor
from smedjan_common.model.ffns import FFNS
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.options import check_options, option, options
from smedjan_common.model.shape import Shape
from smedjan_common.run.flags import MixerFlags, TrainingFlags
from smedjan_common.run.option_flags import option_flags
from smedjan_common.training.objectives import OBJECTIVES

ROWS = {**MIXERS, **FFNS}
MODEL = {"vocab_size": 100, "dim": 64, "layers": 2, "heads": 4, "kv_heads": 4, "ffn_dim": 128, "ssm_head_dim": 32, "experts": 4}
TRAIN = {"steps": 10, "batch_size": 8, "seq_len": 32, "lr": 1e-3}
OF_ROWS = [(row, name) for row in ROWS for name in ROWS[row].own]


@dataclass(frozen=True)
class Sample:
    """One option of each kind."""

    width: int = option(4, "how wide.", least=2, most=9)
    rate: float = option(0.5, "how fast.", over=0, under=1)
    form: Literal["round", "square"] = option("round", "which form.")
    menu: str = option("soup", "what there is.", choices=("soup", "bread"))
    fast: bool = option(False, "whether.")
    left: int = option(3, "worked out.", unset=None, filled="from the others")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 1}, "--width is 1. It must be at least 2, at most 9. Leave it out for the default."),
        ({"width": 10}, "--width is 10."),
        ({"rate": 0.0}, "--rate is 0.0. It must be over 0, under 1."),
        ({"rate": 1.0}, "--rate is 1.0."),
        ({"rate": float("nan")}, "--rate is nan."),
        ({"form": "squar"}, "--form 'squar' is unknown. Did you mean square? Choose one of round, square."),
        ({"menu": "bred"}, "--menu 'bred' is unknown. Did you mean bread? Choose one of soup, bread."),
    ],
    ids=str,
)
def test_a_value_outside_an_option_is_refused_with_its_range_or_its_choices(change, message):
    check_options(Sample(), options(Sample))
    with pytest.raises(ConfigError) as refused:
        check_options(Sample(**change), options(Sample))
    assert str(refused.value).startswith(message)


def test_a_flag_has_the_default_the_help_and_the_choices_of_its_option(capsys):
    flags = option_flags("Flags", options(Sample).values())
    assert tyro.cli(flags, args=[]) == flags(4, 0.5, "round", "soup", False, None)
    assert tyro.cli(flags, args=["--width", "5", "--form", "square", "--fast", "--left", "7"]) == flags(5, 0.5, "square", "soup", True, 7)
    with pytest.raises(SystemExit):
        tyro.cli(flags, args=["--help"])
    told = " ".join(capsys.readouterr().out.replace("│", "").split())
    for part in ("--width INT how wide. (default: 4)", "--form round|square which form. (default: round)", "--menu soup|bread what there"):
        assert part in told
    assert "--left INT worked out. (default: from the others)" in told


@pytest.mark.parametrize(("row", "name"), OF_ROWS)
def test_every_option_of_a_row_is_a_field_of_the_model_and_a_flag_with_its_default(row, name):
    said = ROWS[row].own[name]
    assert options(ModelConfig)[name] == said
    assert said.default == getattr(ModelConfig.preset("tiny"), name)
    pattern = isinstance(said.default, tuple)  # a list in JSON, joined by commas in a flag
    assert ModelConfig.preset("tiny").to_dict()[name] == (list(said.default) if pattern else said.default)
    assert getattr(MixerFlags(), name) == (",".join(said.default) if pattern else said.default)
    assert said.help.endswith(".")


@pytest.mark.parametrize(("row", "name"), [(row, name) for row, name in OF_ROWS if ROWS[row].own[name].choices])
def test_an_unknown_choice_of_a_row_in_use_is_refused_and_of_another_row_is_not(row, name):
    used = {"mixer": (row,)} if row in MIXERS else {"ffn": (row,)}
    with pytest.raises(ConfigError, match="is unknown"):
        ModelConfig(**{**MODEL, **used, name: "nonsense"}).validate()
    other = {"mixer": ("rwkv",), "rwkv_head_dim": 16} if row in MIXERS else {"ffn": ("swiglu",)}
    ModelConfig(**{**MODEL, **other, name: "nonsense"}).validate()  # an old checkpoint may hold it


@pytest.mark.parametrize(("row", "name"), [(row, name) for row, name in OF_ROWS if ROWS[row].own[name].least is not None])
def test_too_small_a_value_of_a_row_in_use_is_refused(row, name):
    used = {"mixer": (row,)} if row in MIXERS else {"ffn": (row,)}
    least = ROWS[row].own[name].least
    with pytest.raises(ConfigError, match=f"It must be at least {least}"):
        ModelConfig(**{**MODEL, **used, name: least - 1}).validate()


def test_every_field_of_the_training_is_an_option_and_a_flag_unless_the_command_or_the_tokenizer_says_it():
    found = options(TrainConfig)
    assert found.keys() == {f.name for f in dataclasses.fields(TrainConfig)}
    others = {name for row in OBJECTIVES.values() if row.command != "train" for name in options(row.options)}
    said = {"objective", "lora_rows", "lora_rows_from", *(others - options(OBJECTIVES["lm"].options).keys())}
    assert {name: option.flag_default for name, option in found.items() if name not in said} == vars(TrainingFlags())
    TrainConfig(**TRAIN).validate()


def test_what_changes_a_tensor_is_not_shape_free_and_what_does_not_is():
    """The table of a model tells: an option is shape-free where another value gives the same tensors."""
    others = {int: lambda value: 2 * value or 1, float: lambda value: 2 * value or 1.0, bool: lambda value: not value}
    others[tuple] = lambda value: ("off",)
    for row in ROWS.values():
        used = {"mixer": (row.name,)} if row.name in MIXERS else {"ffn": (row.name,)}
        model = ModelConfig(
            **{**MODEL, "kv_heads": 4, "mla_kv_rank": 8, "mla_q_rank": 8, "mla_rope_dim": 4, "expert_dim": 32, "qk_norm": True, **used}
        )
        for name, said in row.own.items():
            value = getattr(model, name)
            choices = [choice for choice in said.choices if choice != value] or [others[type(value)](value)]
            changed = [dataclasses.replace(model, **{name: choice}) for choice in choices]
            same = all(row.parameters(model, 1) == row.parameters(other, 1) for other in changed)
            if said.shape_free:
                assert same, name
            else:
                assert not same or name in NOT_IN_THE_TABLE, name


NOT_IN_THE_TABLE = {  # what the weights were trained for, though no tensor shows it
    "linear_feature_map",
    "experts_per_token",
    "norm_topk_prob",
    "routed_scaling_factor",
    "expert_groups",
    "expert_groups_per_token",
}


def test_shape_options_are_those_of_every_model():
    assert not set(options(Shape)) & {name for _, name in OF_ROWS}


@pytest.mark.parametrize(
    ("of", "wanted", "least", "nearest"), [(12, 5, 1, 4), (12, 100, 1, 12), (12, 1, 2, 2), (7, 3, 1, 1), (1, 8, 2, 1), (36, 6, 1, 6)]
)
def test_the_nearest_divisor(of, wanted, least, nearest):
    assert nearest_divisor(of, wanted, least) == nearest
