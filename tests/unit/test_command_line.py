"""What users read when a command line is wrong: three sentences, near names, the names of other programs; never Python's."""

import ast
import dataclasses
import inspect
import re
import shlex
import typing
from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st

from convert.cli import main as convert_command
from convert.formats import DTYPES as WRITTEN
from convert.formats import FORMATS
from smedjan_common import cli, hints
from smedjan_common.command_line import UsageError, check, flags_of, parse
from smedjan_common.commands.backends import BACKENDS
from smedjan_common.errors import flag, near
from smedjan_common.model.ffns import FFNS
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.shape import ROPE_SCALINGS
from smedjan_common.optional import MaybeInt
from smedjan_common.run.given import FIRST
from smedjan_common.training.config import ATTENTION, DTYPES, GRADIENT_CHECKPOINTING, PACKING
from smedjan_common.training.optimizers import OPTIMIZERS
from smedjan_common.training.schedule import SCHEDULES

FLAGS = {name: command.flags_class() for name, command in cli.COMMANDS.items()}


def refused(command: str, *words: str) -> str:
    """The sentences with which a command refuses these words."""
    with pytest.raises(UsageError) as error:
        check(list(flags_of(FLAGS[command])), f"smedjan {command}", list(words))
    return str(error.value)


@pytest.mark.parametrize("command", FLAGS)
def test_no_sentence_of_the_help_breaks_where_its_docstring_does(command):
    """tyro keeps the line breaks of a docstring under a field: what takes two lines is given to arg(help=...)."""
    groups = [hint for hint in typing.get_type_hints(FLAGS[command]).values() if dataclasses.is_dataclass(hint)]
    kinds = {each for kind in (FLAGS[command], *groups) for each in kind.__mro__ if each.__module__.startswith(("smedjan_", "convert"))}
    broken = []
    for kind in kinds:
        body = ast.parse(inspect.getsource(kind)).body[0].body
        said = [node.value.value for node in body[1:] if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)]
        broken += [text for text in said if "\n" in text]
    assert not broken


@pytest.mark.parametrize("command", FLAGS)
@pytest.mark.parametrize("words", [("--nonsense", "3"), ("--force=maybe",), ("--steps", "ten"), ("x", "y", "z"), ("--output",)])
def test_every_command_refuses_in_three_sentences_without_boxes_and_types(command, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(FLAGS[command], f"smedjan {command}", [*words, "--also-nonsense"])
    out, err = capsys.readouterr()
    assert (stopped.value.code, out) == (2, "")
    assert err.startswith("error: ")
    assert 2 <= len(err.splitlines()) <= 3
    assert not re.search(r"[╭│]|<class|NoneType|invalid literal|\bSTR\b|Traceback|\.\.\.\.", err)


@pytest.mark.parametrize(
    ("command", "words", "told"),
    [
        ("train", ("--datset", "a"), "Did you mean --dataset"),
        ("train", ("--steps", "ten"), "It must be a whole number."),
        ("train", ("--steps=1e4",), "Write --steps 10000."),
        ("train", ("--steps", "10k"), "Write --steps 10000."),
        ("train", ("--steps", "2.5"), "Write --steps 2, for example."),
        ("train", ("--vocab-size", "32,000"), "Write --vocab-size 32000."),
        ("train", ("--lr", "fast"), "--lr cannot be 'fast'. It must be a number."),
        ("train", ("--lr=",), "--lr has no value."),
        ("train", ("--dataset", "--steps", "3"), "--dataset has no value. It takes one or several values. Write --dataset FILE."),
        ("train", ("a.txt", "--dataset", "b.txt"), "'a.txt' and --dataset are both given. A word alone is --dataset."),
        ("generate", ("runs/a", "--checkpoint=runs/b"), "'runs/a' and --checkpoint are both given."),
        (
            "generate",
            ("runs/a", "Once", "upon"),
            "'upon' is not understood. smedjan generate takes RUN [TEXT]. Put a text of several words",
        ),
        ("generate", ("runs/a", "Once", "--prompt", "b"), "'Once' and --prompt are both given."),
        ("chat", ("runs/a", "runs/b"), "'runs/b' is not understood. smedjan chat takes RUN."),
        ("eval", ("runs/a", "a.txt", "--dataset", "b.txt"), "'a.txt' and --dataset are both given."),
        ("plot", (), "smedjan plot needs RUN. It has no default."),
        ("sizes", ("tiny",), "'tiny' is not understood. smedjan sizes takes only flags and their values."),
        ("train", ("--deterministic", "true"), "It is a switch and takes none. Write --deterministic or --no-deterministic."),
        ("train", ("--dry-run=yes",), "Write --dry-run or leave it out."),
        ("generate", ("--prompt", "-x"), "If it is the value, write --prompt=-x"),
        ("generate", ("--prompt", "--checkpoint", "a"), "--prompt has no value."),
        ("generate", (), "smedjan generate needs RUN. It has no default."),
        ("prepare", ("--errors", "ignore"), "It must be one of strict, replace."),
        ("mix", (), "needs --shards FILE:WEIGHT,… and --output FILE."),
        ("convert", ("a",), "needs DST."),
        ("convert", ("a", "b"), "needs --to neutral|orbax|hf|quantized|gguf|peft|mlx-lm."),
        ("info", ("a", "b"), "'b' is not understood."),
        ("prepare", ("--input", ""), "--input is empty. An unset shell variable has this effect. Give --input a value."),
        ("train", ("--dataset", ""), "--dataset is empty."),
        ("train", ("a", "--pretrained", ""), "--pretrained is empty."),
        ("tokenizer", ("a", "--output", ""), "--output is empty."),
        ("prepare", ("a", "--output="), "--output is empty."),
        ("dedup", ("a", ""), "--input is empty."),
        ("process", ("a", "--report="), "--report is empty."),
        ("generate", ("a", "--prompt-file", ""), "--prompt-file is empty."),
        ("convert", ("a", ""), "DST is empty."),
        ("plot", ("",), "RUN is empty."),
        ("prepare", ("--input", "a", "--input", "b c"), "is given twice. The values are a the first time and 'b c' later."),
        ("prepare", ("--input", "a", "--input", "b c"), "Write all values after one flag: --input a 'b c'"),
    ],
)
def test_what_is_wrong_is_told_with_its_remedy(command, words, told):
    assert told in refused(command, *words)


@pytest.mark.parametrize(
    ("command", "theirs", "told"),
    [
        ("train", "--learning-rate", "called --lr here"),
        ("train", "--learning_rate", "called --lr here"),
        ("train", "--max-steps", "called --steps here"),
        ("train", "--epochs", "counted in --steps"),
        ("train", "--num-train-epochs", "counted in --steps"),
        ("sft", "--num-train-epochs", "called --epochs here"),
        ("sft", "--assistant-only-loss", "called --train-on here"),
        ("dpo", "--loss-type", "called --loss here"),
        ("dpo", "--ref-model", "called --reference here"),
        ("train", "--context-length", "called --seq-len here"),
        ("train", "--output-dir", "called --checkpoint-dir here"),
        ("train", "--per-device-train-batch-size", "called --batch-size here"),
        ("train", "--num-layers", "called --layers here"),
        ("train", "--n-embd", "called --dim here"),
        ("train", "--data", "called --dataset here"),
        ("train", "--model", "called --size or --pretrained here"),
        ("train", "--resume-from-checkpoint", "called --resume here"),
        ("generate", "--model", "called --checkpoint here"),
        ("generate", "--max-new-tokens", "called --max-tokens here"),
        ("tokenizer", "--data", "called --input here"),
        ("tokenizer", "--output-dir", "called --output here"),
    ],
)
def test_flags_of_other_programs_are_known(command, theirs, told):
    assert told in refused(command, theirs, "3")


@pytest.mark.parametrize(
    ("known", "theirs", "told"),
    [
        (cli.COMMANDS, "finetune", "--pretrained"),
        (cli.COMMANDS, "finetune", "`smedjan sft`"),
        (cli.COMMANDS, "instruct", "called sft here"),
        (cli.COMMANDS, "orpo", "called dpo here"),
        (cli.COMMANDS, "export", "called convert here"),
        (cli.COMMANDS, "sample", "called generate here"),
        (cli.COMMANDS, "chat", "called generate here"),
        (cli.COMMANDS, "pretrain", "called train here"),
        (cli.COMMANDS, "encode", "called prepare here"),
        (MIXERS, "mamba", "called ssm here"),
        (MIXERS, "Mamba_2", "called ssm here"),
        (MIXERS, "gqa", "--kv-heads"),
        (MIXERS, "retnet", "--linear-decay fixed"),
        (MIXERS, "rwkv7", "called rwkv here"),
        (MIXERS, "deltanet", "gated-deltanet"),
        (MIXERS, "sliding-window", "--window"),
        (FFNS, "moe", "called experts here"),
        (OPTIMIZERS, "adam", "adamw with --weight-decay 0"),
        (SCHEDULES, "cosine-with-warmup", "called cosine here"),
        (SCHEDULES, "inverse_sqrt", "called invsqrt here"),
        (DTYPES, "bf16", "called bfloat16 here"),
        (FORMATS, "huggingface", "called hf here"),
        (BACKENDS, "pytorch", "called jax here"),
        (MIXERS, "attnetion", "Did you mean attention"),
        (OPTIMIZERS, "zzz", "Known: adamw, muon, lion."),
    ],
)
def test_names_of_other_programs_are_known(known, theirs, told):
    assert told in near(theirs, known)


def test_the_hints_name_flags_and_names_that_there_are():
    flags = {each.name.lstrip("-") for kind in FLAGS.values() for each in flags_of(kind)}
    names = {*cli.COMMANDS, *MIXERS, *FFNS, *OPTIMIZERS, *SCHEDULES, *DTYPES, *GRADIENT_CHECKPOINTING, *PACKING, *ATTENTION, *BACKENDS}
    assert set(hints.FLAGS) <= flags
    assert set(hints.NAMES) <= names | {*FORMATS, *WRITTEN, *ROPE_SCALINGS}
    for table in (hints.FLAGS, hints.NAMES):
        theirs = {name for row in table.values() for name in row.split()}
        assert all(name == name.lower().replace("_", "-") for name in theirs), "as `instead` looks them up"
    assert {name for row in hints.NOTES for name in row.split()} <= {
        name for table in (hints.FLAGS, hints.NAMES) for row in table.values() for name in row.split()
    }


@pytest.mark.parametrize("command", FLAGS)
def test_the_examples_of_every_command_are_command_lines_that_it_takes(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    examples = re.search(r"For example:\n((?:  .+\n)+)", out)
    assert examples, out
    lines = examples[1].splitlines()
    assert len(lines) >= 2
    for program, *words in map(shlex.split, lines):
        if program == "smedjan":
            assert words.pop(0) == command
        else:
            assert program == command
        check(list(flags_of(FLAGS[command])), command, words)


def test_help_of_train_begins_with_ten_flags_that_there_are(capsys):
    with pytest.raises(SystemExit):
        cli.main(["help", "train"])
    begin = capsys.readouterr().out.split("Begin with these")[1].split("\n\n")[0]
    shown = re.findall(r"^  (--[a-z-]+)", begin, re.MULTILINE)
    assert shown == [flag(name) for name in FIRST]
    assert len(shown) == 10
    assert max(map(len, begin.splitlines())) <= 80


@pytest.mark.parametrize(
    ("command", "words", "same"),
    [
        ("train", ("my.txt",), ("--dataset", "my.txt")),
        ("train", ("--steps", "3", "my.txt"), ("--dataset", "my.txt", "--steps", "3")),
        ("train", ("a.bin:0.7", "b.bin:0.3", "--qk-norm"), ("--dataset", "a.bin:0.7", "b.bin:0.3", "--qk-norm")),
        ("train", ("--val-dataset", "v.txt", "--", "my.txt", "-x.txt"), ("--dataset", "my.txt", "./-x.txt", "--val-dataset", "v.txt")),
        ("generate", ("runs/a", "--prompt=-x", "--stop", "a", "b"), ("--checkpoint", "runs/a", "--prompt=-x", "--stop", "a", "b")),
        ("generate", ("--no-echo", "-3"), ("--checkpoint", "./-3", "--no-echo")),
        ("generate", ("runs/a", "--seed", "1", "Once upon"), ("--checkpoint", "runs/a", "--prompt", "Once upon", "--seed", "1")),
        ("generate", ("--", "runs/a", "-x"), ("--checkpoint", "runs/a", "--prompt=-x")),
        ("eval", ("runs/a", "a.txt", "b/", "--stride", "3"), ("--checkpoint", "runs/a", "--dataset", "a.txt", "b/", "--stride", "3")),
        ("eval", ("runs/a", "--tasks", "sums"), ("--checkpoint", "runs/a", "--tasks", "sums")),
        ("tokenizer", ("a.txt", "b/", "--vocab-size", "300"), ("--input", "a.txt", "b/", "--vocab-size", "300")),
        ("prepare", ("a.txt",), ("--input", "a.txt")),
        ("process", ("a.txt", "--output", "b.jsonl"), ("--input", "a.txt", "--output", "b.jsonl")),
        ("dedup", ("a.txt", "--output", "b.jsonl"), ("--input", "a.txt", "--output", "b.jsonl")),
    ],
)
def test_the_flag_of_what_a_command_reads_may_be_left_out(command, words, same):
    assert parse(FLAGS[command], command, list(words)) == parse(FLAGS[command], command, list(same))


@pytest.mark.parametrize("command", FLAGS)
def test_the_help_shows_no_default_where_there_is_none(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    assert not re.findall(r"default:[\s│]*(?:None|\))", capsys.readouterr().out)


@pytest.mark.parametrize("command", [name for name, kind in FLAGS.items() if any(each.nameless for each in flags_of(kind))])
def test_the_usage_of_a_command_shows_what_it_takes_without_a_flag(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    nameless = [each for each in flags_of(FLAGS[command]) if each.nameless]
    shown = " ".join(each.metavar if each.required else f"[{each.metavar}]" for each in nameless)
    assert capsys.readouterr().out.startswith(f"usage: smedjan {command} {shown} ")


@dataclass(frozen=True)
class Group:
    """A group."""

    rate: float = 0.5
    maybe: MaybeInt = None


@dataclass(frozen=True)
class Toy:
    """Every kind of flag."""

    source: tyro.conf.Positional[str]
    count: int = 3
    name: str = "x"
    files: tuple[str, ...] = ()
    loud: bool = False
    plain: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    mode: Literal["a", "b"] = "a"
    group: tyro.conf.OmitArgPrefixes[Group] = field(default_factory=Group)


WORDS = ["--count", "--name", "--files", "--loud", "--no-loud", "--plain", "--no-plain", "--mode", "--rate", "--maybe", "--count=4"]
WORDS += [
    "--name=",
    "--name=-x",
    "3",
    "-3",
    "2.5",
    "-1e3",
    "-inf",
    "a",
    "c",
    "text",
    "-x",
    "-",
    "None",
    "--other",
    "--loud=1",
    "--rate=",
    "",
]


@given(st.lists(st.sampled_from(WORDS), max_size=5))
def test_what_the_check_lets_through_tyro_takes(words):
    try:
        check(list(flags_of(Toy)), "toy", words)
    except UsageError:
        return
    tyro.cli(Toy, args=words, config=(tyro.conf.DisallowNone,))


def test_what_the_check_lets_through_is_what_was_meant():
    flags = parse(Toy, "toy", ["here", "--files", "a", "b", "--rate", "-1e3", "--no-loud", "--maybe", "7", "--mode=b", "--plain"])
    assert flags == Toy("here", files=("a", "b"), plain=True, mode="b", group=Group(-1000.0, 7))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--count", "3", "--count=4"], "note: --count is given twice, as 3 and as 4: the last one counts.\n"),
        (["--no-loud", "--loud", "--count", "4"], "note: --no-loud and --loud are both given: the last one counts.\n"),
        (["--count", "4", "--plain", "--plain", "--count=4"], ""),
        (["--files", "a", "b", "--count", "4", "--files", "a", "b"], ""),
    ],
)
def test_which_of_two_values_counts_is_told(words, told, capsys):
    assert parse(Toy, "toy", ["here", *words]) == Toy("here", 4, loud="--loud" in words, plain="--plain" in words, files=FILES[words[0]])
    assert capsys.readouterr().err == told


FILES = {"--files": ("a", "b"), "--count": (), "--no-loud": ()}


def test_convert_has_the_name_by_which_it_was_called(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        cli.main(["convert", "a"])
    assert "smedjan convert needs DST." in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["convert", "a"])
    with pytest.raises(SystemExit):
        convert_command()
    assert capsys.readouterr().err.startswith("error: convert needs DST.")
