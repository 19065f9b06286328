"""`smedjan prepare`: text into token files, with a validation part."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from smedjan_common import errors
from smedjan_common.command_line import NAMELESS, parse
from smedjan_common.optional import MaybeStr
from smedjan_common.settings import from_file

HELD_OUT = {"document": "whole documents", "tail": "the end of the text"}  # by how the text is split


@dataclass(frozen=True)
class Flags:
    """Tokenise text into a token file that training maps from disk, and hold out a part of it for validation."""

    input: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATH ..."), NAMELESS]
    """Text, .jsonl, .json and .parquet files, compressed, datasets (hf:NAME[:CONFIG[:SPLIT]]), directories, globs, s3:// or https://."""
    tokenizer: Annotated[str, tyro.conf.arg(metavar="FILE")] = "tokenizer.json"
    """The tokenizer.json to use."""
    output: Annotated[str, tyro.conf.arg(metavar="FILE")] = "train.bin"
    """The token file; its manifest and document offsets go beside it."""
    val_output: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """A second token file with the validation part; needs --val-fraction."""
    val_fraction: float = 0.0
    """The part held out, between 0 and 1: whole documents, or the end of the text where there are few documents."""
    field: str = "text"
    """The field or column that holds the text."""
    errors: Literal["strict", "replace"] = "strict"
    """Bytes that are not UTF-8: refuse the file, or replace them by U+FFFD."""
    workers: Annotated[int | None, tyro.conf.arg(help_behavior_hint="")] = None
    """Number of processes that tokenise; all cores by default."""
    executor: Literal["local", "ray"] = "local"
    """Where they are: on this machine, or on those of a Ray cluster (RAY_ADDRESS, else the one that `ray start` began here)."""
    force: bool = False
    """Replace --output and --val-output if they exist."""
    config: Annotated[MaybeStr, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Flags from a TOML file, flat or in the table [prepare]; those of the command line win."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit code."""
    flags = parse(
        Flags,
        "smedjan prepare",
        argv,
        "smedjan prepare my.txt --tokenizer tokenizer.json --output train.bin",
        "smedjan prepare texts/ --output train.bin --val-output val.bin --val-fraction 0.02",
        more=from_file(Flags, "prepare", ("tokenizer",)),
    )
    return errors.run_command(lambda: _run(flags))


def _run(flags: Flags) -> int:
    from smedjan_common.commands.outputs import check_outputs, token_file_names
    from smedjan_common.data.prepare import prepare
    from smedjan_common.reporting.progress import progress_bar
    from smedjan_common.tokenizer import Tokenizer

    outputs = [name for path in (flags.output, flags.val_output) for name in token_file_names(path)]
    check_outputs(outputs, flags.force, [*flags.input, flags.tokenizer])
    tokenizer = Tokenizer.load(flags.tokenizer)
    with progress_bar() as show:
        summary = prepare(
            flags.input,
            flags.output,
            tokenizer,
            val_output=flags.val_output,
            val_fraction=flags.val_fraction,
            field=flags.field,
            workers=flags.workers,
            executor=flags.executor,
            progress=lambda done, total: show("tokenise", done, total),
            errors=flags.errors,
        )
    print(_line(summary.output, summary.tokens, summary.documents, summary.bytes))
    if summary.val_output:
        print(_line(summary.val_output, summary.val_tokens, summary.val_documents, summary.val_bytes) + f" ({HELD_OUT[summary.split]})")
    rate = (summary.bytes + summary.val_bytes) / max(summary.seconds, 1e-9) / 1e6
    if summary.skipped:
        print(f"Left out, for they have no text (empty or null): {summary.skipped:,}")
    if summary.resumed:
        print("This continued a run that was stopped.")
    print(f"{summary.bytes_per_token:.2f} bytes per token, {summary.seconds:.1f} s, {rate:.1f} MB/s")
    return 0


def _line(path: str, tokens: int, documents: int, size: int) -> str:
    from smedjan_common.reporting.console import counted

    return f"{path}: {counted(tokens, 'token')}, {counted(documents, 'document')}, {counted(size, 'byte')} of text"
