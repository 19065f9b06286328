"""The sizes that every model has (Shape). A row of the menus adds its own: `class Options(Shape)`."""

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
    norm_eps: float = option(1e-5, shape_free=True)
    rope_base: float = option(10000.0, shape_free=True)
    rope_scaling: Literal["none", "ntk", "yarn"] = option("none", shape_free=True)
    rope_factor: float = option(1.0, shape_free=True)
    rope_original_len: int = option(0, shape_free=True)
    init_std: float = option(0.02, shape_free=True, inert=True)

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
