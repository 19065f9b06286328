"""Evaluate a model with MLX: `python -m smedjan_mlx.eval`. The program itself is smedjan_common.commands.eval."""

import sys

from smedjan_common.commands import backends, eval
from smedjan_mlx import openblas


def load():
    """Import the framework: the backend's class, and the dtype that auto means on this machine."""
    from smedjan_mlx.backend import MlxBackend, default_dtype

    return MlxBackend, default_dtype()


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""

    def run() -> int:
        openblas.preload(sys.argv[1:] if argv is None else argv)
        return eval.run("mlx", load, argv)

    return backends.program("mlx", argv, run)


if __name__ == "__main__":
    sys.exit(main())
