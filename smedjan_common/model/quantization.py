"""Quantised weights: which tensors are, how their codes lie. To infer only; training wants whole weights. rounding.py makes them.

    w = scale * code + bias        one scale and one bias, float16, for 32 weights of a row; codes of 8 or 4 bits, unsigned

In params `X.weight` [..., out, in] is then three arrays, as in a file of MLX: `X.weight` uint32 [..., out, in * bits / 32], codes one after
another from the lowest bits on; `X.scales` and `X.biases` float16 [..., out, in / 32].

| bits | rounding | is exactly |
|---|---|---|
| 8 | symmetric: scale = max|w| / 127, code = round(w / scale) + 128, bias = -128 scale | llama.cpp's Q8_0 |
| 4 | from the least to the largest: scale = (max - min) / 15, bias = min | llama.cpp's Q4_1 |

The embedding and the head have 8 bits always. Norms, routers, gates of shared experts, vectors, convolutions and matrices whose
rows are no multiple of 32 stay float32.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from smedjan_common.model.parameter import ParamSpec
from smedjan_common.model.params import parameter_table
from smedjan_common.model.shape import Shape

FORMAT = "quantized"  # the name of the form on the command line
GROUP = 32
BITS = (8, 4)
VOCABULARY_BITS = 8
_WEIGHT = ".weight"


class Names(NamedTuple):
    """Of the three arrays of a quantised weight."""

    codes: str
    scales: str
    biases: str


def names(weight: str) -> Names:
    """`X.weight` -> `X.weight`, `X.scales`, `X.biases`."""
    stem = weight.removesuffix(_WEIGHT)
    return Names(weight, f"{stem}.scales", f"{stem}.biases")


def bits_of(codes: tuple[int, ...], scales: tuple[int, ...]) -> int:
    """Bits of a code, by the shapes of codes and scales."""
    return codes[-1] // scales[-1]  # a group of 32 codes takes as many words as a code has bits


def quantized_names(params: Mapping[str, Any]) -> set[str]:
    """The weights among these arrays that are quantised."""
    return {name for name in params if name.endswith(_WEIGHT) and names(name).scales in params}


def planned(config: Shape, bits: int) -> dict[str, int]:
    """The weights of a model that are quantised, by name, and the bits of each."""
    return {name: VOCABULARY_BITS if "vocab" in spec.axes else bits for name, spec in parameter_table(config).items() if _fits(spec)}


def _fits(spec: ParamSpec) -> bool:
    fit = (
        spec.name.endswith(_WEIGHT)
        and spec.shape[-1] % GROUP == 0
        and not spec.name.endswith((".router.weight", ".shared_gate.weight", ".conv.weight"))
    )
    return fit and (spec.matrix or "vocab" in spec.axes)
