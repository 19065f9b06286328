"""The flags of a command line completed by what the run begins with: a run that goes on says the rest, weights say the context.

Flags that are given and contradict the run are refused here or in run.checks; what differs and is allowed is told (run.notes).
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smedjan_common.errors import ConfigError, DataError
from smedjan_common.run.asked import Asked
from smedjan_common.run.chat_data import chat_data, check_masked, speaker
from smedjan_common.run.data import (
    RunData,
    check_same_share,
    check_vocab_size,
    note_other_beginnings,
    recorded_datasets,
    run_data,
    trains_tokenizer,
)
from smedjan_common.run.recorded import recall
from smedjan_common.run.resume import check_tokenizer
from smedjan_common.run.settings import pretrained_length
from smedjan_common.run.start import Begin, GoOn, New, Pretrained, Say
from smedjan_common.run.teacher import own_tokenizer, teacher_info
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.tokenizer.ends import Ends
from smedjan_common.tokenizer.growing import extends


def complete(asked: Asked, begin: Begin, say: Say) -> Asked:
    """`asked` with what was not given from the run or the weights. Raises ConfigError, DataError for data flags that contradict it."""
    if isinstance(begin, GoOn):
        return _recalled(asked, begin, say)
    if isinstance(begin, Pretrained) and not asked.is_given("seq_len"):
        base, length = begin.info.model, pretrained_length(begin.info.model, asked)
        times = "" if length == base.context_length else " times --rope-factor"
        say(f"note: --seq-len is {length}, the context of {begin.info.path}{times}.")
        return asked.having(seq_len=length)
    return asked


def _recalled(asked: Asked, begin: GoOn, say: Say) -> Asked:
    flags = begin.recorded.get("flags") or {}
    _check_vocab_size(asked, begin, flags, say)
    return dataclasses.replace(asked, flags=recall(asked.flags, asked.given, flags))


def _check_vocab_size(asked: Asked, begin: GoOn, flags: dict[str, Any], say: Say) -> None:
    size, has = asked.value("vocab_size"), begin.info.model.vocab_size
    if not asked.is_given("vocab_size") or size in (has, flags.get("vocab_size")):
        return
    if "vocab_size" in flags:
        raise ConfigError(
            f"--vocab-size {size} is not that of the run, which has {has} tokens.",
            "A run goes on with the tokenizer it began with.",
            "Leave it out, or start a new run with another --checkpoint-dir.",
        )
    say(f"note: --vocab-size {size} does nothing: the tokenizer of the run has {has} tokens.")


def data_of(asked: Asked, begin: Begin, folder: Path, dry_run: bool, before: Callable[[RunData], None] = lambda known: None) -> RunData:
    """The data of the run, as run.data makes it; a run that goes on has its token files and its tokenizer. Raises DataError.

    before: as run_data has it.
    """
    info = None if isinstance(begin, New) else begin.info
    own = own_tokenizer(info) if info else None
    if asked.chats and (not isinstance(begin, GoOn) or asked.is_given("dataset")):
        return _conversations(asked, asked.chats.template, begin, own, folder, dry_run, before)
    given = asked.given
    if isinstance(begin, GoOn):
        asked, given = _with_own_data(asked, begin, own), given - {"vocab_size"}  # held against the run already

    if taught := teacher_info(asked, None) if isinstance(begin, New) and trains_tokenizer(asked.flags.data) else None:
        own = own_tokenizer(taught)

    def check(tokenizer: Tokenizer) -> None:
        if taught:
            check_vocab_size(asked.flags.data, given, tokenizer, f"the tokenizer of {taught.path}")
        if info:
            check_tokenizer(info, tokenizer)
        if isinstance(begin, Pretrained):
            check_vocab_size(asked.flags.data, given, tokenizer, f"the tokenizer of {begin.info.path}")

    data = run_data(asked.flags.data, given, folder, own, dry_run, check, before)
    if info and own and data.tokenizer and data.tokenizer.chat is None:
        data.tokenizer.chat = own.chat  # the tokenizer of a token file is often a copy without it
    if info and own and data.tokenizer and data.tokenizer.ends == Ends():
        data.tokenizer.ends = own.ends
    if data.train:
        note_other_beginnings(data)
    if asked.chats:
        check_masked(data, pairs=asked.pairs is not None)
    return data


def _conversations(
    asked: Asked, template: str, begin: Begin, own: Tokenizer | None, folder: Path, dry_run: bool, before: Callable[[RunData], None]
) -> RunData:
    """The data of `smedjan sft` and `smedjan dpo`, which may give the tokenizer of the weights a few tokens more. Raises DataError,
    TemplateError."""
    assert not isinstance(begin, New), "run.checks"
    if not asked.value("dataset"):
        fix = f"Give {'pairs of answers' if asked.pairs else 'conversations'}: smedjan {asked.command} FILE.jsonl."
        raise DataError("There is nothing to learn from.", "--dataset is not given.", fix)
    base = Tokenizer.load(asked.value("tokenizer")) if asked.value("tokenizer") and not isinstance(begin, GoOn) else own
    if base is None:
        raise DataError(f"{begin.info.path} has no tokenizer.", "Conversations become tokens by that of the weights.", "Give --tokenizer.")
    if own is None or not extends(base, own):
        check_tokenizer(begin.info, base)
    if isinstance(begin, Pretrained):
        check_vocab_size(asked.flags.data, asked.given, base, f"the tokenizer of {begin.info.path}")
    goes_on = isinstance(begin, GoOn)
    name = template if asked.is_given("template") or not goes_on else "auto"
    train = begin.info.train if goes_on else None
    seen = own.vocab_size if own else base.vocab_size
    speaks = speaker(name, base, may_grow=not goes_on)
    speaks = speaks._replace(gained=max(0, speaks.tokenizer.vocab_size - seen))
    return chat_data(asked, (train or asked.flags.training).seq_len, folder, speaks, dry_run, before)


def _with_own_data(asked: Asked, begin: GoOn, own: Tokenizer | None) -> Asked:
    if own and not asked.is_given("tokenizer"):
        asked = asked.having(tokenizer=None)  # wherever that of the first command line is now
    if asked.is_given("dataset"):
        return asked
    known = recorded_datasets(begin.folder, begin.recorded)
    if known:
        check_same_share(asked.flags.data, asked.given, begin.recorded.get("flags") or {})
    if asked.is_given("val_dataset"):
        known.pop("val_dataset", None)
    return asked.having(**known)
