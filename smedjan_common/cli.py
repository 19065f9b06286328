"""`smedjan <command>`: only the module of the command that is asked for is imported (commands/table.py)."""

import importlib
import sys

from smedjan_common import streams
from smedjan_common.commands.table import COMMANDS


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit code: 2 for a command that is not known."""
    try:
        return _main(argv)
    except KeyboardInterrupt:  # while Python still reads files, before run_command
        return 130


def _main(argv: list[str] | None) -> int:
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
