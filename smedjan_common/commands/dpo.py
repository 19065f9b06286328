"""`smedjan dpo`, and the body of `python -m smedjan_jax.dpo` and `python -m smedjan_mlx.dpo`: `smedjan train` on pairs of answers."""

from smedjan_common.commands import train


def main(argv: list[str]) -> int:
    """`smedjan dpo`: hand over to the backend's own program."""
    return train.main(argv, "dpo")


def run(name: str, load: train.Load, argv: list[str] | None = None, connect: train.Connect | None = None) -> int:
    """Parse and train with the backend `name`; returns the exit code."""
    return train.run(name, load, argv, "dpo", connect)
