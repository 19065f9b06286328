"""Teach a model to answer, with MLX: `python -m smedjan_mlx.sft`. The program itself is smedjan_common.commands.sft."""

import sys

from smedjan_common.commands import backends, sft
from smedjan_mlx import openblas
from smedjan_mlx.train import connect, load


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""

    def run() -> int:
        openblas.preload(sys.argv[1:] if argv is None else argv)
        return sft.run("mlx", load, argv, connect)

    return backends.program("mlx", argv, run)


if __name__ == "__main__":
    sys.exit(main())
