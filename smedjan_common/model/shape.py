"""The sizes that every model has (Shape). A row of the menus adds its own: `class Options(Shape)`. An option with a help is a flag."""

from dataclasses import dataclass
from typing import Literal

from smedjan_common.model.options import option, options
from smedjan_common.model.presets import VOCAB_MULTIPLE


@dataclass(frozen=True)
class Shape:
    """A pre-norm decoder: embedding, `layers` blocks of (mixer, feed-forward), final norm, tied head."""

    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn_dim: int
    context_length: int = option(1024, shape_free=True, inert=True)
    mixer: tuple[str, ...] = ("attention",)
    ffn: tuple[str, ...] = ("swiglu",)
    norm_eps: float = option(1e-5, over=0, most=1, shape_free=True)
    # with a larger base or factor, periods of NTK-aware scaling overflow float32
    rope_base: float = option(10000.0, "Base of the rotary frequencies.", over=1, most=1e24, shape_free=True)
    rope_scaling: Literal["none", "ntk", "yarn"] = option(
        "none", "Stretch positions to extend the context of --pretrained.", shape_free=True
    )
    rope_factor: float = option(1.0, "How much --rope-scaling stretches.", most=1e6, shape_free=True)
    rope_original_len: int = option(
        0,
        "The context that the weights were trained with.",
        filled="that of --pretrained; else the context over the factor",
        shape_free=True,
    )
    init_std: float = option(0.02, "Standard deviation of the initial weights.", shape_free=True, inert=True)

    @property
    def head_dim(self) -> int:
        """Features of one head, K."""
        return self.dim // self.heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: the vocabulary rounded up to a multiple of 64, which tensor cores want."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def mixer_of(self, layer: int) -> str:
        """Name of the mixer in `layer`: the pattern repeats over the depth."""
        return self.mixer[layer % len(self.mixer)]

    def ffn_of(self, layer: int) -> str:
        """Name of the feed-forward in `layer`: the pattern repeats over the depth."""
        return self.ffn[layer % len(self.ffn)]


ROPE_SCALINGS = options(Shape)["rope_scaling"].choices
