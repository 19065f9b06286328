"""Teach a model from pairs of answers, with MLX: `python -m smedjan_mlx.dpo`. The program itself is smedjan_common.commands.dpo."""

import sys

from smedjan_common.commands import backends, dpo
from smedjan_mlx import openblas
from smedjan_mlx.train import connect, load


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""

    def run() -> int:
        openblas.preload(sys.argv[1:] if argv is None else argv)
        return dpo.run("mlx", load, argv, connect)

    return backends.program("mlx", argv, run)


if __name__ == "__main__":
    sys.exit(main())
