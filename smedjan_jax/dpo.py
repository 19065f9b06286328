"""Teach a model from pairs of answers, with JAX/Flax: `python -m smedjan_jax.dpo`. The program itself is smedjan_common.commands.dpo."""

import sys

from smedjan_common.commands import backends, dpo
from smedjan_jax.train import connect, load


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return backends.program("jax", argv, lambda: dpo.run("jax", load, argv, connect))


if __name__ == "__main__":
    sys.exit(main())
