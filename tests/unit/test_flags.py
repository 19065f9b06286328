"""The flags of training: a frozen list, one meaning for both backends, none that nothing reads."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

import smedjan_common
from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.errors import ConfigError, DataError
from smedjan_common.model.ffns import FFNS
from smedjan_common.model.ffns.experts import ROUTERS
from smedjan_common.model.ffns.experts import Options as Experts
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.options import options
from smedjan_common.model.parameter import ParamSpec
from smedjan_common.reference import optim
from smedjan_common.run.data import check_data_flags
from smedjan_common.run.flags import DataFlags, MixerFlags, ReportFlags, RunFlags, TrainFlags, TrainingFlags, flag_names, given_names
from smedjan_common.run.folder import RunConfig
from smedjan_common.run.given import parse
from smedjan_common.run.options import check_options, check_report_options
from smedjan_common.run.settings import new_model
from smedjan_common.training.objectives import OBJECTIVES
from smedjan_common.training.optimizers import OPTIMIZERS
from smedjan_common.training.schedule import SCHEDULES, learning_rate
from tests.fakes.runs import ROOT, check_new


def names(kind):
    return {f.name for f in dataclasses.fields(kind)}


def test_the_list_of_flags_is_the_frozen_one():
    assert flag_names() == (ROOT / "tests" / "fixtures" / "train_flags.txt").read_text().split()


SAID_BY_TOKENIZERS = {"lora_rows", "lora_rows_from"}
# options of other commands are flags of theirs
SAID_BY_COMMANDS = {"objective"} | {
    name for row in OBJECTIVES.values() for name in options(row.options) if name not in options(OBJECTIVES["lm"].options)
}


def test_every_setting_of_training_is_a_flag_and_none_is_more():
    assert names(TrainingFlags) == names(TrainConfig) - SAID_BY_COMMANDS - SAID_BY_TOKENIZERS
    assert names(ReportFlags) <= names(RunConfig)


def test_defaults_are_those_of_the_configuration():
    derived = {"dtype": "auto"}
    for field in (field for field in dataclasses.fields(TrainConfig) if field.name not in SAID_BY_COMMANDS | SAID_BY_TOKENIZERS):
        flag = getattr(TrainingFlags(), field.name)
        if field.default is not dataclasses.MISSING and flag is not None and field.name not in ("batch_size", "seq_len"):
            assert flag == derived.get(field.name, field.default), field.name


@pytest.mark.parametrize("name", sorted(names(DataFlags) | names(RunFlags) | names(ReportFlags)))
def test_every_flag_is_read_somewhere(name):
    sources = [path.read_text() for path in Path(smedjan_common.__file__).parent.rglob("*.py") if path.name != "flags.py"]
    assert any(re.search(rf'\.{name}\b|value\("{name}"\)', source) for source in sources)


def test_parse_tells_what_was_given():
    flags, given = parse(["--steps", "7", "--lr=1e-3", "--batch_size", "4", "--dataset", "a.txt", "b.txt"])
    assert given == {"steps", "lr", "batch_size", "dataset"}
    assert (flags.training.steps, flags.training.lr, flags.training.batch_size) == (7, 1e-3, 4)
    assert flags.data.dataset == ("a.txt", "b.txt")


def test_a_file_without_a_flag_counts_as_given():
    assert parse(["a.txt", "--steps", "7"]) == parse(["--dataset", "a.txt", "--steps", "7"])
    assert parse(["a.txt"])[1] == {"dataset"}


def test_nothing_given_is_the_defaults():
    assert parse([]) == (TrainFlags(), frozenset())


def test_given_names_are_of_flags_only():
    assert given_names(["--sample-prompt", "lr", "--nonsense", "--keep=0"]) == {"sample_prompt", "keep"}


def test_an_unknown_flag_is_exit_2_and_the_near_one_is_named(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(["--datset", "a.txt"])
    assert stopped.value.code == 2
    assert "--dataset" in capsys.readouterr().err


@pytest.mark.parametrize("option", [field.name for field in dataclasses.fields(MixerFlags)])
def test_every_option_of_a_mixer_belongs_to_a_row_and_is_refused_without_it(option):
    owners = [row for row in (*MIXERS.values(), *FFNS.values()) if option in row.own]
    assert owners, "a row must say that it reads it"
    plain = ModelConfig.preset("tiny", mixer=("linear",) if owners[0].name == "attention" else ("attention",))
    with pytest.raises(ConfigError, match="would do nothing"):
        check_options(dataclasses.replace(plain, **{option: 7}), frozenset({option}))


@pytest.mark.parametrize(
    ("words", "none_of_it"),
    [
        ((), ("--experts", "0", "--shared-experts", "0", "--balance-loss", "0", "--router-z-loss", "0")),
        (("--mixer", "ssm"), ("--window", "0", "--no-qk-norm", "--attention", "auto")),
        (("--experts", "4", "--router", "bias"), ("--balance-loss", "0")),
        (("--experts", "4"), ("--router-bias-rate", "0")),
        (("--dataset", "a.bin"), ("--val-fraction", "0")),
        (("--dataset", "a.txt", "--val-dataset", "b.txt"), ("--val-fraction", "0")),
    ],
)
def test_an_option_that_asks_for_none_of_what_a_run_lacks_is_taken_and_changes_no_model(words, none_of_it):
    flags, given = parse([*words, *none_of_it])
    check_new(*words, *none_of_it)
    assert len(given) == len(parse([*words])[1]) + sum(word.startswith("--") for word in none_of_it)
    assert new_model(flags, 300) == new_model(parse([*words])[0], 300)


def test_a_rotary_base_is_refused_where_no_layer_turns():
    with pytest.raises(ConfigError, match="--rope-base would do nothing"):
        check_new("--mixer", "ssm", "--rope-base", "500000")
    check_new("--mixer", "ssm,mla", "--rope-base", "500000")


def test_what_a_row_reads_of_the_training_is_a_flag():
    rows = [row.training for row in MIXERS.values()] + [row.options for row in (*OPTIMIZERS.values(), *SCHEDULES.values())]
    assert {name for row in (*rows, *ROUTERS.values()) for name in options(row)} <= names(TrainingFlags)
    assert tuple(ROUTERS) == options(Experts)["router"].choices


BIAS = ("--experts", "4", "--router", "bias")


@pytest.mark.parametrize(
    ("words", "option", "fix"),
    [
        ((), ("--muon-steps", "5"), ("--optimizer", "muon")),
        ((), ("--no-muon-nesterov",), ("--optimizer", "muon")),
        (("--optimizer", "lion"), ("--eps", "1e-8"), ("--optimizer", "adamw")),
        ((), ("--decay-fraction", "0.2"), ("--lr-schedule", "wsd")),
        (("--lr-schedule", "constant"), ("--min-lr-ratio", "0.1"), ("--lr-schedule", "cosine")),
        ((), ("--balance-loss", "0.1"), ("--experts", "4", "--router", "softmax")),
        (BIAS, ("--router-z-loss", "0.1"), ("--router", "softmax")),
        (("--experts", "4"), ("--router-bias-rate", "0.1"), ("--router", "bias")),
        ((), ("--chunk-size", "32"), ("--mixer", "attention,linear")),
        (("--mixer", "ssm"), ("--attention", "plain"), ("--mixer", "ssm,mla")),
    ],
)
def test_an_option_of_training_that_nothing_would_read_is_refused_and_the_fix_helps(words, option, fix):
    with pytest.raises(ConfigError, match=f"{option[0].replace('no-', '')} would do nothing"):
        check_new(*words, *option)
    check_new(*words, *option, *fix)
    check_new(*words)


MOVED = {
    "beta1": 0.5,
    "beta2": 0.5,
    "eps": 0.1,
    "muon_momentum": 0.5,
    "muon_steps": 2,
    "muon_nesterov": False,
    "min_lr_ratio": 0.5,
    "decay_fraction": 0.6,
}


@pytest.mark.parametrize("option", sorted({name for row in OPTIMIZERS.values() for name in options(row.options)}))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_reads_just_the_options_that_its_row_names(optimizer, option):
    specs = {"a": ParamSpec("a", (4, 3), ("embed", "heads")), "b": ParamSpec("b", (3,), ("embed",))}
    rng = np.random.default_rng(0)
    params, *grads = ({name: size * rng.normal(size=spec.shape) for name, spec in specs.items()} for size in (1.0, 1.0, 0.1))

    def after_two_steps(**changes):
        train = TrainConfig(steps=2, batch_size=1, seq_len=8, lr=0.1, optimizer=optimizer, **changes)
        values, state = params, optim.init(train, specs, params)
        for grad in grads:
            values, state = optim.update(train, specs, values, grad, state, 0.1)
        return {name: value.tolist() for name, value in values.items()}

    assert (after_two_steps() != after_two_steps(**{option: MOVED[option]})) == (option in options(OPTIMIZERS[optimizer].options))


@pytest.mark.parametrize("option", sorted({name for row in SCHEDULES.values() for name in options(row.options)}))
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_reads_just_the_options_that_its_row_names(schedule, option):
    def rates(**changes):
        train = TrainConfig(steps=100, batch_size=1, seq_len=8, lr=0.1, lr_schedule=schedule, **changes)
        return [learning_rate(train, step) for step in range(100)]

    assert (rates() != rates(**{option: MOVED[option]})) == (option in options(SCHEDULES[schedule].options))


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--val-fraction", "2", "--dataset", "a.txt"), "at least 0 and under 1"),
        (("--val-fraction", "nan", "--dataset", "a.txt"), "at least 0 and under 1"),
        (("--val-fraction", "0.1", "--dataset", "a.bin:0.5", "b.bin"), "would do nothing"),
        (("--val-fraction", "0.1", "--dataset", "a.txt", "--val-dataset", "b.txt"), "would do nothing"),
    ],
)
def test_a_share_to_hold_out_that_cannot_be_is_refused_before_anything_is_read(words, why):
    flags, given = parse([*words])
    with pytest.raises(DataError, match=why):
        check_data_flags(flags.data, given)
    with pytest.raises(DataError, match=why):
        check_new(*words)


OPTIONS_OF_NOTHING = [
    ("--sample-prompt", "a", "--sample-every", "0"),
    ("--sample-tokens", "9", "--sample-every", "0"),
    ("--eval-batches", "3", "--eval-every", "0"),
]


@pytest.mark.parametrize("words", OPTIONS_OF_NOTHING)
def test_options_of_samples_and_validation_that_are_never_made_are_refused(words):
    flags, given = parse([*words])
    with pytest.raises(ConfigError, match="would do nothing"):
        check_report_options(flags.report, given)
    for more in ([], ["--sample-every", "5", "--eval-every", "5"]):
        flags, given = parse([*words[:2], *more])
        check_report_options(flags.report, given)
