"""The flags of a command line completed by what the run begins with: a run that goes on says the rest, weights say the context.

Flags that are given and contradict the run are refused here or in run.checks; what differs and is allowed is told (run.notes).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from smedjan_common.errors import ConfigError
from smedjan_common.files.names import TOKENIZER
from smedjan_common.run.asked import Asked
from smedjan_common.run.data import RunData, check_same_share, check_vocab_size, recorded_datasets, run_data
from smedjan_common.run.recorded import recall
from smedjan_common.run.resume import check_tokenizer
from smedjan_common.run.settings import pretrained_length
from smedjan_common.run.start import Begin, GoOn, New, Pretrained, Say
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.tokenizer.ends import Ends


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
    return Asked(recall(asked.flags, asked.given, flags), asked.given)


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
    own = Tokenizer.load(info.path) if info and (info.path / TOKENIZER).is_file() else None
    given = asked.given
    if isinstance(begin, GoOn):
        asked, given = _with_own_data(asked, begin, own), given - {"vocab_size"}  # held against the run already

    def check(tokenizer: Tokenizer) -> None:
        if info:
            check_tokenizer(info, tokenizer)
        if isinstance(begin, Pretrained):
            check_vocab_size(asked.flags.data, given, tokenizer, f"the tokenizer of {begin.info.path}")

    data = run_data(asked.flags.data, given, folder, own, dry_run, check, before)
    if own and data.tokenizer and data.tokenizer.chat is None:
        data.tokenizer.chat = own.chat  # the tokenizer of a token file is often a copy without it
    if own and data.tokenizer and data.tokenizer.ends == Ends():
        data.tokenizer.ends = own.ends
    return data


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
