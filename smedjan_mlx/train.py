"""Train with MLX: `python -m smedjan_mlx.train`. The program itself is smedjan_common.commands.train."""

import sys

from smedjan_common.commands import backends, train
from smedjan_mlx import openblas


def load(deterministic: bool = False):
    """Import the framework: what makes the backend, and the dtype that auto means on this machine."""
    from smedjan_mlx.backend import MlxBackend, default_dtype

    return MlxBackend, default_dtype()


def connect(asked):
    """Meet the other processes of the run, where there are any."""
    from smedjan_mlx.hosts import connect

    return connect(asked)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""

    def run() -> int:
        openblas.preload(sys.argv[1:] if argv is None else argv)
        return train.run("mlx", load, argv, connect=connect)

    return backends.program("mlx", argv, run)


if __name__ == "__main__":
    sys.exit(main())
