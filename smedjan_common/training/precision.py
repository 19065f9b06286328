"""What --dtype names: the dtype of activations and of what is multiplied, and whether large matrices are multiplied in float8.

Parameters, optimizer and sums are float32 in every row.
"""

from typing import NamedTuple

from smedjan_common.errors import ConfigError


class Precision(NamedTuple):
    """A row. compute: dtype of activations, of the head and of what float8 does not take. float8: whether projections and feed-forward
    multiply in float8 (E4M3 forward, E5M2 for gradients; Micikevicius et al., 2022). without: backends that do not have it."""

    name: str
    compute: str
    float8: bool
    without: tuple[str, ...] = ()


PRECISIONS = {
    row.name: row
    for row in (
        Precision("float32", "float32", False),
        Precision("bfloat16", "bfloat16", False),
        Precision("float8", "bfloat16", True, ("mlx",)),
    )
}

BYTES = {"float32": 4, "bfloat16": 2}  # of one number of a compute dtype

FLOAT8_MULTIPLE = 16  # both sides of a matrix that tensor cores multiply in float8
FLOAT8_LEAST = 128  # smaller matrices cost more to quantise than their product saves


def compute_dtype(dtype: str) -> str:
    """The dtype of activations that --dtype `dtype` means."""
    return PRECISIONS[dtype].compute


def check_precision(backend: str, dtype: str) -> None:
    """Raises ConfigError where a backend does not have --dtype `dtype`."""
    if dtype in PRECISIONS and backend in PRECISIONS[dtype].without:
        fix = "Take --dtype bfloat16 or float32, or train with --backend jax."
        raise ConfigError(f"--dtype {dtype} is not for the backend {backend}.", f"{backend} has no products of {dtype} matrices.", fix)


def multiplied_in_float8(shape: tuple[int, ...]) -> bool:
    """Whether a weight of this shape is one that float8 takes: a matrix, large and of even sides."""
    return len(shape) == 2 and min(shape) >= FLOAT8_LEAST and all(size % FLOAT8_MULTIPLE == 0 for size in shape)
