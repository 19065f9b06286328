"""`smedjan tokenizer`: learn a byte-level BPE vocabulary from text and write it as tokenizer.json."""

import time
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from smedjan_common import errors
from smedjan_common.command_line import NAMELESS, parse
from smedjan_common.optional import MaybeStr
from smedjan_common.settings import from_file


@dataclass(frozen=True)
class Flags:
    """Learn a byte-level BPE tokenizer from text and write it as a Hugging Face tokenizer.json."""

    input: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH ..."), NAMELESS]
    """Text, .jsonl, .json and .parquet files, compressed, datasets (hf:NAME[:CONFIG[:SPLIT]]), directories, globs, s3:// or https://."""
    output: Annotated[str, tyro.conf.arg(metavar="FILE")] = "tokenizer.json"
    """Where to write the tokenizer."""
    vocab_size: int = 8192
    """Number of ids, special tokens included."""
    pattern: Annotated[str, tyro.conf.arg(metavar="NAME|REGEX")] = "cl100k"
    """How text is cut into words: cl100k, gpt2, cl100k-digits1, cl100k-digits2 (digits one by one, in twos), or a regular expression."""
    special: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ("<|endoftext|>",)
    """Special tokens; they get the last ids."""
    min_count: int = 2
    """Pairs that occur less often are never merged."""
    byte_order: Literal["gpt2", "raw"] = "gpt2"
    """Ids of the 256 bytes: as GPT-2 and Hugging Face number them, or the byte itself."""
    field: str = "text"
    """The field or column that holds the text."""
    errors: Literal["strict", "replace"] = "strict"
    """Bytes that are not UTF-8: refuse the file, or replace them by U+FFFD."""
    workers: Annotated[int | None, tyro.conf.arg(help_behavior_hint="")] = None
    """Number of processes that count words; all cores by default."""
    executor: Literal["local", "ray"] = "local"
    """Where they are: on this machine, or on those of a Ray cluster (RAY_ADDRESS, else the one that `ray start` began here)."""
    report: bool = False
    """After training print bytes per token by kind of text, the longest tokens and how many are unused."""
    force: bool = False
    """Replace --output if it exists."""
    config: Annotated[MaybeStr, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Flags from a TOML file, flat or in the table [tokenizer]; those of the command line win."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit code."""
    flags = parse(
        Flags,
        "smedjan tokenizer",
        argv,
        "smedjan tokenizer my.txt --vocab-size 4096 --output tokenizer.json",
        "smedjan tokenizer texts/ --vocab-size 32768 --report",
        more=from_file(Flags, "tokenizer", ("prepare",)),
    )
    return errors.run_command(lambda: _run(flags))


def _run(flags: Flags) -> int:
    from smedjan_common.commands.outputs import check_outputs
    from smedjan_common.reporting.progress import progress_bar
    from smedjan_common.text.sources import find, refuse_pipes
    from smedjan_common.tokenizer import Tokenizer

    check_outputs([flags.output], flags.force, flags.input)
    if flags.report:
        refuse_pipes(find(flags.input, field=flags.field), "--report reads the text once more.")
    started = time.monotonic()
    with progress_bar() as show:
        tokenizer = Tokenizer.train(
            flags.input,
            flags.vocab_size,
            flags.pattern,
            flags.special,
            show,
            flags.min_count,
            flags.byte_order,
            flags.workers,
            flags.field,
            flags.errors,
            flags.executor,
        )
    file = tokenizer.save(flags.output)
    print(f"{file}: {tokenizer.vocab_size} tokens, hash {tokenizer.hash[:16]}, learnt in {time.monotonic() - started:.1f} s")
    if tokenizer.vocab_size < flags.vocab_size:
        print(
            f"The text has no more pairs that occur {flags.min_count} times: {tokenizer.vocab_size} of {flags.vocab_size} ids were learnt."
        )
    if flags.report:
        from smedjan_common.tokenizer.report import report

        print(report(tokenizer, flags.input, flags.field, flags.errors))
    return 0
