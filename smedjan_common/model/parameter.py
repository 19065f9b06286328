"""One tensor of the parameter table (ParamSpec), and how its usual kinds are written."""

import math
from typing import NamedTuple

from smedjan_common.model.shape import Shape


class ParamSpec(NamedTuple):
    """One tensor of the tree.

    name: dotted path, equal to the attribute path in both backends and the key in checkpoints.
    shape: extents, weights [out, in].
    axes: logical axis of each dimension (vocab, embed, heads, kv_heads, ffn, experts, or None): what a mesh shards by. Tensors of
        more dimensions whose values are used one by one, and not as a linear map (taps of convolutions), have only None.
    init: name of a row of INITIALIZERS. scale: its parameter or parameters (the standard deviation of "normal").
    decay: whether weight decay applies. lr_scale: multiplies the learning rate; 0: no optimizer moves it.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str = "normal"
    scale: float | tuple[float, ...] = 0.02
    decay: bool = True
    lr_scale: float = 1.0

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def matrix(self) -> bool:
        """Whether it maps hidden features to hidden features, [out, in], or is one such map per expert, [E, out, in]."""
        maps = self.axes[1:] if len(self.axes) == 3 and self.axes[0] == "experts" else self.axes
        return len(maps) == 2 and any(maps) and "vocab" not in maps


def norm_spec(name: str, dim: int) -> ParamSpec:
    """The weight of an RMSNorm over `dim` features: ones, never decayed."""
    return ParamSpec(name, (dim,), ("embed",), "ones", 1.0, decay=False)


def head_norm(name: str, dim: int) -> ParamSpec:
    """The weight of an RMSNorm over features that no mesh splits."""
    return norm_spec(f"{name}.weight", dim)._replace(axes=(None,))


def weight(name: str, out: int, into: int, axes: tuple[str | None, str | None], std: float) -> ParamSpec:
    """The tensor `{name}.weight` [out, into] of a linear map, normal with standard deviation `std`."""
    return ParamSpec(f"{name}.weight", (out, into), axes, "normal", std)


def bias(name: str, out: int, axis: str | None) -> ParamSpec:
    """The tensor `{name}.bias` [out] of a linear map: zeros, never decayed."""
    return ParamSpec(f"{name}.bias", (out,), (axis,), "zeros", 0.0, decay=False)


def residual_std(config: Shape) -> float:
    """Standard deviation of projections that write to the residual: init_std / sqrt(2 layers) (GPT-2, 2019)."""
    return config.init_std / (2 * config.layers) ** 0.5
