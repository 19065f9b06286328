"""What a layer holds of a token while a model trains: what it keeps for the backward pass, and what its own backward pass works with.

XLA and MLX fuse, copy and recompute as they see fit, so how many copies there are of what is measured and not derived: `features` of a
row are the values that its forward pass makes of a token, by the sizes of the model, and its MEASURED says how often they are held on a
platform (bench/results/estimates-*.json, which tests hold the sums against).

Platforms: "gpu" is JAX on an NVIDIA GPU, "cpu" JAX on a CPU, "cpu-0.10" JAX before 0.11 there, whose compiler undoes gradient
checkpointing, and "mlx" MLX, measured on a CPU. "kernels" is a GPU with this project's kernels: what is kept was measured at two depths
and three lengths (bench/results/kernels-h200.json, kernel_lengths-h200.json), without gradient checkpointing; the rest is the plain form's.
"""

from collections.abc import Mapping
from typing import NamedTuple

RECOMPUTES_NOTHING = "cpu-0.10"  # the platform
LARGEST_FUSED_HEAD = 128  # features of a query; cuDNN's attention takes no more


class Activations(NamedTuple):
    """Values per token of one layer. kept: for the backward pass; dots, full: kept with that gradient checkpointing;
    working: held beside them while the layer is differentiated."""

    kept: float
    dots: float
    full: float
    working: float

    def times(self, factor: float) -> "Activations":
        """As many copies of each."""
        return Activations(*(value * factor for value in self))

    def with_(self, other: "Activations") -> "Activations":
        """Both at once."""
        return Activations(*(a + b for a, b in zip(self, other, strict=True)))


Measured = Mapping[str, Activations]  # platform -> copies of the features of a row

NOTHING = Activations(0, 0, 0, 0)

BLOCK = Activations(4, 1, 1, 0)  # widths of a block: its residuals and what its two norms give; when it is recomputed its input


class Course(NamedTuple):
    """How a step is computed. width: bytes of a value of the compute dtype; plain: --attention plain; kernels: the mixer is computed by
    this project's kernels, which keep less than its plain form."""

    platform: str
    seq_len: int
    chunk_size: int = 64
    width: int = 4
    plain: bool = False
    kernels: bool = False

    @property
    def form(self) -> str:
        """A platform, or "kernels"."""
        return "kernels" if self.kernels else self.platform

    def fused(self, head_size: int) -> bool:
        """Whether attention over heads of this size never holds its T x T scores."""
        return self.platform == "gpu" and self.width == 2 and not self.plain and head_size <= LARGEST_FUSED_HEAD and head_size % 8 == 0


SCORES: Measured = {  # copies of the T x T scores of all heads in the compute dtype
    "gpu": Activations(2.1, 0, 0, 0.23),
    "cpu": Activations(2.9, 0, 0, 0.11),
    "cpu-0.10": Activations(2.9, 2.9, 2.9, 0.27),
    "mlx": Activations(0.77, 0, 0, 2.3),
}


def scores(course: Course, heads: int, head_size: int) -> Activations:
    """The scores of a query with every position, of all heads: none where attention is fused."""
    if course.fused(head_size):
        return NOTHING
    wide = 3.3 / 2.1 if course.width == 2 else 1  # they are float32 in any case, their softmax is not
    return SCORES[course.platform].times(wide * heads * course.seq_len)
