"""Evaluate a model with JAX/Flax: `python -m smedjan_jax.eval`. The program itself is smedjan_common.commands.eval."""

import sys

from smedjan_common.commands import backends, eval


def load():
    """Import the framework: the backend's class, and the dtype that auto means on this machine."""
    from smedjan_jax.backend import JaxBackend, default_dtype

    return JaxBackend, default_dtype()


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return backends.program("jax", argv, lambda: eval.run("jax", load, argv))


if __name__ == "__main__":
    sys.exit(main())
