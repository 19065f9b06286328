"""Train with JAX/Flax: `python -m smedjan_jax.train`. The program itself is smedjan_common.commands.train."""

import sys

from smedjan_common.commands import backends, train


def load(deterministic: bool = False):
    """Import the framework: what makes the backend, and the dtype that auto means on this machine."""
    from smedjan_jax.backend import default_dtype, training_backend
    from smedjan_jax.startup import configure

    configure(deterministic)
    return training_backend, default_dtype()


def connect(asked):
    """Meet the other processes of the run, where there are any."""
    from smedjan_jax.hosts import connect

    return connect(asked)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return backends.program("jax", argv, lambda: train.run("jax", load, argv, connect=connect))


if __name__ == "__main__":
    sys.exit(main())
