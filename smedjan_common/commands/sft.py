"""`smedjan sft`, and the body of `python -m smedjan_jax.sft` and `python -m smedjan_mlx.sft`: `smedjan train` on conversations."""

from smedjan_common.commands import train


def main(argv: list[str]) -> int:
    """`smedjan sft`: hand over to the backend's own program."""
    return train.main(argv, "sft")


def run(name: str, load: train.Load, argv: list[str] | None = None, connect: train.Connect | None = None) -> int:
    """Parse and train with the backend `name`; returns the exit code."""
    return train.run(name, load, argv, "sft", connect)
