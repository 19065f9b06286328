"""Teach a model to answer, with JAX/Flax: `python -m smedjan_jax.sft`. The program itself is smedjan_common.commands.sft."""

import sys

from smedjan_common.commands import backends, sft
from smedjan_jax.train import connect, load


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return backends.program("jax", argv, lambda: sft.run("jax", load, argv, connect))


if __name__ == "__main__":
    sys.exit(main())
