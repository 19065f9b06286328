"""`smedjan mix`: several token files into one, by weight."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from smedjan_common import errors
from smedjan_common.command_line import parse


@dataclass(frozen=True)
class Flags:
    """Mix token files by weight into one, document by document, no document twice."""

    shards: Annotated[str, tyro.conf.arg(metavar="FILE:WEIGHT,…")]
    """Token files and their weights, such as a.bin:0.7,b.bin:0.3; shares are of tokens."""
    output: Annotated[str, tyro.conf.arg(metavar="FILE")]
    """The token file to write."""
    tokens: Annotated[int | None, tyro.conf.arg(help_behavior_hint="")] = None
    """Stop at this many tokens; by default when the first file runs out of documents."""
    seed: int = 0
    """Determines the order of the documents."""
    tokenizer: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """The tokenizer of the files, to count the bytes of text in the mixture."""
    force: bool = False
    """Replace --output if it exists."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit code."""
    flags = parse(
        Flags,
        "smedjan mix",
        argv,
        "smedjan mix --shards a.bin:0.7,b.bin:0.3 --output mixed.bin",
        "smedjan mix --shards a.bin:1,b.bin:1 --tokens 1000000 --output mixed.bin",
    )
    return errors.run_command(lambda: _run(flags))


def _run(flags: Flags) -> int:
    from smedjan_common.commands.outputs import check_outputs, token_file_names
    from smedjan_common.data.mix import mix
    from smedjan_common.data.mixture import parse_shards
    from smedjan_common.reporting.console import counted
    from smedjan_common.reporting.progress import progress_bar
    from smedjan_common.tokenizer import Tokenizer

    shards = parse_shards(flags.shards)
    read = [name for path, _ in shards for name in token_file_names(path)]
    check_outputs(token_file_names(flags.output), flags.force, [*read, flags.tokenizer])
    tokenizer = Tokenizer.load(flags.tokenizer) if flags.tokenizer else None
    with progress_bar("steps") as show:
        parts = mix(
            shards,
            flags.output,
            tokens=flags.tokens,
            seed=flags.seed,
            tokenizer=tokenizer,
            progress=lambda done, total: show("documents", done, total),
        )
    total, weights = sum(part.tokens for part in parts), sum(part.weight for part in parts)
    print(f"{flags.output}: {counted(total, 'token')}, {counted(sum(part.documents for part in parts), 'document')}")
    for part in parts:
        share, left = f"{part.tokens / total:.1%} ({part.weight / weights:.1%} asked for)", part.all_documents - part.documents
        print(f"  {part.path}: {share}, {part.tokens:,} of {part.all_tokens:,} tokens, {counted(left, 'document')} left over")
    return 0
