"""The flags of training: a frozen list, one meaning for both backends, none that nothing reads."""

import dataclasses
import re
from pathlib import Path

import pytest

import smedjan_common
from smedjan_common.config import ModelConfig, TrainConfig
from smedjan_common.errors import ConfigError
from smedjan_common.flags import DataFlags, MixerFlags, ReportFlags, RunFlags, TrainFlags, TrainingFlags, flag_names, given_names, parse
from smedjan_common.mixers import FFNS, MIXERS
from smedjan_common.resume import check_options
from smedjan_common.run_folder import RunConfig
from tests.fakes.runs import ROOT


def names(kind):
    return {f.name for f in dataclasses.fields(kind)}


def test_the_list_of_flags_is_the_frozen_one():
    assert flag_names() == (ROOT / "tests" / "fixtures" / "train_flags.txt").read_text().split()


def test_every_setting_of_training_is_a_flag_and_none_is_more():
    assert names(TrainingFlags) == names(TrainConfig)
    assert names(ReportFlags) <= names(RunConfig)


def test_defaults_are_those_of_the_configuration():
    derived = {"dtype": "auto"}
    for field in dataclasses.fields(TrainConfig):
        flag = getattr(TrainingFlags(), field.name)
        if field.default is not dataclasses.MISSING and flag is not None and field.name not in ("batch_size", "seq_len"):
            assert flag == derived.get(field.name, field.default), field.name


@pytest.mark.parametrize("name", sorted(names(DataFlags) | names(RunFlags) | names(ReportFlags)))
def test_every_flag_is_read_somewhere(name):
    sources = [path.read_text() for path in Path(smedjan_common.__file__).parent.rglob("*.py") if path.name != "flags.py"]
    assert any(re.search(rf"\.{name}\b", source) for source in sources)


def test_parse_tells_what_was_given():
    flags, given = parse(["--steps", "7", "--lr=1e-3", "--batch_size", "4", "--dataset", "a.txt", "b.txt"])
    assert given == {"steps", "lr", "batch_size", "dataset"}
    assert (flags.training.steps, flags.training.lr, flags.training.batch_size) == (7, 1e-3, 4)
    assert flags.data.dataset == ("a.txt", "b.txt")


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
    owners = [row for row in (*MIXERS.values(), *FFNS.values()) if option in row.options]
    assert owners, "a row must say that it reads it"
    plain = ModelConfig.preset("tiny", mixer=("linear",) if owners[0].name == "attention" else ("attention",))
    with pytest.raises(ConfigError, match="would do nothing"):
        check_options(plain, frozenset({option}))
