"""`smedjan import-bpe`: a byte-level BPE tokenizer of another tool as tokenizer.json, or ours as tiktoken ranks."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from smedjan_common import errors
from smedjan_common.command_line import parse


@dataclass(frozen=True)
class Flags:
    """Turn GPT-2's merges.txt, a tiktoken rank file, Mistral's tekken.json or a tokenizer.json into a tokenizer.json with the same ids."""

    merges: Annotated[str, tyro.conf.arg(metavar="FILE")]
    """merges.txt, a tiktoken rank file (base64 and rank on each line), tekken.json or a tokenizer.json; recognised by its content."""
    vocab: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """The vocab.json (encoder.json) beside merges.txt; without it ids follow the merges, as GPT-2's do."""
    output: Annotated[str, tyro.conf.arg(metavar="FILE")] = "tokenizer.json"
    """What to write; a name that ends in .tiktoken gives a rank file."""
    pattern: Annotated[str | None, tyro.conf.arg(metavar="NAME|REGEX", help_behavior_hint="")] = None
    """How text is split, where the file does not say: gpt2 (default for merges), cl100k (default for ranks), or an expression."""
    special: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="")] = ()
    """Special tokens to add after the last id; <|endoftext|> by default where merges.txt comes without a vocabulary."""
    force: bool = False
    """Replace --output if it exists."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit code."""
    flags = parse(
        Flags,
        "smedjan import-bpe",
        argv,
        "smedjan import-bpe --merges merges.txt --vocab vocab.json --output tokenizer.json",
        "smedjan import-bpe --merges cl100k_base.tiktoken",
    )
    return errors.run_command(lambda: _run(flags))


def _run(flags: Flags) -> int:
    from smedjan_common.commands.outputs import check_outputs
    from smedjan_common.files.atomic_file import write_atomically
    from smedjan_common.tokenizer import Tokenizer, foreign

    check_outputs([flags.output], flags.force, [flags.merges, flags.vocab])
    tokenizer = Tokenizer(foreign.read(flags.merges, flags.vocab, flags.pattern, flags.special), repr(flags.merges))
    if flags.output.endswith(".tiktoken"):
        write_atomically(flags.output, foreign.dump_ranks(tokenizer.vocabulary).encode())
    else:
        tokenizer.save(flags.output)
    names = ", ".join(f"{name} {number}" for name, number in tokenizer.special_tokens.items()) or "none"
    print(f"{flags.output}: {tokenizer.vocab_size} ids, hash {tokenizer.hash[:16]}, special tokens: {names}")
    return 0
