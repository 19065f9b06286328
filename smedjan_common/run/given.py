"""The command line of training: its flags, which of them were given, and what --config adds to them."""

import functools
from typing import NamedTuple

from smedjan_common.command_line import read
from smedjan_common.run.flags import DpoFlags, SftFlags, TrainFlags, given_names

FIRST = {  # what a newcomer sets, and the few words for it in the help
    "dataset": "FILE: your text, JSONL or token file",
    "checkpoint_dir": "DIR: where the run lives; give it again to go on",
    "size": "the model: tiny, small, medium, large … (`smedjan sizes`)",
    "mixer": "attention, ssm, linear …: what its layers are",
    "steps": "how many; by default once over the text",
    "batch_size": "sequences of a step",
    "seq_len": "tokens of a sequence: the context of the model",
    "lr": "the learning rate",
    "sample_every": "steps between texts that show how it is getting on",
    "dry_run": "say what would be done, and what memory it takes",
}


class Kind(NamedTuple):
    """A command that trains: its name, the class of its flags, examples, and the flags that its help shows first."""

    name: str
    flags: type[TrainFlags]
    examples: tuple[str, ...]
    first: dict[str, str]


TRAIN = Kind(
    "train",
    TrainFlags,
    ("smedjan train my.txt --checkpoint-dir runs/mine --size tiny --steps 400", "smedjan train --checkpoint-dir runs/mine --steps 800"),
    FIRST,
)
SFT = Kind(
    "sft",
    SftFlags,
    ("smedjan sft chats.jsonl --pretrained runs/mine --checkpoint-dir runs/chat", "smedjan sft --checkpoint-dir runs/chat --epochs 3"),
    {
        "dataset": "FILE: your conversations",
        "pretrained": "PATH: the model that learns them",
        "checkpoint_dir": FIRST["checkpoint_dir"],
        "epochs": "how often they are gone through",
        "batch_size": "sequences of a step, each of several conversations",
        "lr": "the learning rate",
        "train_on": "replies, or all of a conversation",
        "dry_run": FIRST["dry_run"],
    },
)

DPO = Kind(
    "dpo",
    DpoFlags,
    ("smedjan dpo pairs.jsonl --pretrained runs/chat --checkpoint-dir runs/better", "smedjan dpo --checkpoint-dir runs/better --epochs 2"),
    {
        "dataset": "FILE: your pairs of answers",
        "pretrained": "PATH: the model that learns them, one that answers already",
        "checkpoint_dir": FIRST["checkpoint_dir"],
        "loss": "sigmoid (DPO), ipo, simpo, orpo",
        "beta": "how much the difference of two answers counts",
        "epochs": "how often the pairs are gone through",
        "batch_size": "sequences of a step, each of several pairs",
        "lr": "the learning rate",
        "dry_run": FIRST["dry_run"],
    },
)

KINDS = {kind.name: kind for kind in (TRAIN, SFT, DPO)}


def parse(argv: list[str] | None = None, prog: str = "", kind: Kind = TRAIN) -> tuple[TrainFlags, frozenset[str]]:
    """The flags and the names of those that were given. Exits with 2 on a flag that is not known."""
    more = functools.partial(words_of_config, kind=kind)
    flags, words = read(kind.flags, prog or f"smedjan {kind.name}", argv, *kind.examples, first=kind.first, more=more)
    return flags, given_names(words)


def words_of_config(words: list[str], kind: Kind = TRAIN) -> list[str]:
    """What --config adds to the words of a command line. Raises UsageError."""
    named = [word for word in words if word.split("=")[0] == "--config"]
    if not named:
        return []
    from smedjan_common.run.config_file import words_of
    from smedjan_common.settings import paths

    return words_of(paths(words)[-1], given_names(words), kind.flags)
