"""`smedjan <command>`: a table of commands; only the module of the one that is asked for is imported."""

import importlib
import sys
from typing import NamedTuple

from smedjan_common import streams


class Command(NamedTuple):
    """`module` has `main(argv) -> exit code`; `about` is its line in `smedjan --help`."""

    module: str
    about: str


COMMANDS: dict[str, Command] = {
    "tokenizer": Command("smedjan_common.commands.tokenizer", "train a tokenizer on your text"),
    "prepare": Command("smedjan_common.commands.prepare", "tokenise text into a token file to train on"),
    "import-bpe": Command("smedjan_common.commands.import_bpe", "make tokenizer.json from GPT-2, tiktoken or Hugging Face files"),
    "process": Command("smedjan_common.commands.process", "clean text: separators, normalisation, quality rules, provenance"),
    "dedup": Command("smedjan_common.commands.dedup", "leave out documents that repeat others, exactly or nearly"),
    "mix": Command("smedjan_common.commands.mix", "mix token files by weight into one"),
    "hash": Command("smedjan_common.commands.hash", "fingerprints of texts, tokenizers and token files"),
    "sizes": Command("smedjan_common.commands.sizes", "parameters, FLOPs and memory of every model size"),
    "train": Command("smedjan_common.commands.train", "train a model, or go on with a run"),
    "generate": Command("smedjan_common.commands.generate", "continue a text with a trained model"),
    "convert": Command("convert.cli", "to and from Hugging Face, to llama.cpp's GGUF"),
    "info": Command("smedjan_common.commands.info", "say what a checkpoint, run, token file or tokenizer is"),
    "runs": Command("smedjan_common.commands.runs", "list runs and compare them in numbers"),
    "plot": Command("smedjan_common.commands.plot", "draw the loss of one or several runs"),
    "quickstart": Command("smedjan_common.commands.quickstart", "all of it once, on a small corpus, in about two minutes"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit code: 2 for a command that is not known."""
    streams.settle()
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["help"] and argv[1:]:
        argv = [argv[1], "--help"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        streams.put(overview(), sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] in ("-V", "--version", "version"):
        from smedjan_common import __version__

        print(f"smedjan {__version__}")
        return 0
    from smedjan_common.errors import SmedjanError, near, run_command

    if argv[0] not in COMMANDS:

        def refuse() -> int:
            raise SmedjanError(f"There is no command {argv[0]!r}.", near(argv[0], COMMANDS), "See `smedjan --help`.")

        return run_command(refuse)
    return run_command(lambda: importlib.import_module(COMMANDS[argv[0]].module).main(argv[1:]))


def overview() -> str:
    """What `smedjan --help` prints."""
    width = max(map(len, COMMANDS)) + 2
    rows = "\n".join(f"  {name:<{width}}{command.about}" for name, command in COMMANDS.items())
    return (
        "usage: smedjan COMMAND [FLAGS]\n\nTrains language models from raw text: JAX on NVIDIA GPUs, MLX on Apple Silicon.\n\n"
        f"{rows}\n\n`smedjan help COMMAND` has the flags of a command."
    )


if __name__ == "__main__":
    sys.exit(main())
