"""The sizes that every model has (Shape). A row of the menus adds its own: `class Options(Shape)`. An option with a help is a flag."""

from dataclasses import dataclass
from typing import Literal

from smedjan_common.model.options import option, options
from smedjan_common.model.presets import VOCAB_MULTIPLE

SWITCH = ("on", "off")  # what a pattern over the depth may say of a layer


@dataclass(frozen=True)
class Shape:
    """A pre-norm decoder: embedding, `layers` blocks of (mixer, feed-forward), final norm, head (tied: the embedding)."""

    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn_dim: int
    context_length: int = option(1024, shape_free=True, inert=True)
    mixer: tuple[str, ...] = ("attention",)
    ffn: tuple[str, ...] = ("swiglu",)
    norm_eps: float = option(1e-5, "Added to the mean square in RMSNorm.", over=0, most=1, shape_free=True)
    # with a larger base or factor, periods of NTK-aware scaling overflow float32
    rope_base: float = option(10000.0, "Base of the rotary frequencies.", over=1, most=1e24, shape_free=True)
    rope_scaling: Literal["none", "ntk", "yarn", "linear", "llama3", "longrope"] = option(
        "none", "Stretch positions to extend the context of --pretrained.", shape_free=True
    )
    rope_factor: float = option(1.0, "How much --rope-scaling stretches.", most=1e6, shape_free=True)
    rope_original_len: int = option(
        0,
        "The context that the weights were trained with.",
        filled="that of --pretrained; else the context over the factor",
        shape_free=True,
    )
    rope_low_freq_factor: float = option(
        1.0, "llama3 scaling: periods over the original context divided by this are stretched whole.", over=0, most=1e6, shape_free=True
    )
    rope_high_freq_factor: float = option(
        4.0, "llama3 scaling: periods under the original context divided by this stay.", over=0, most=1e6, shape_free=True
    )
    rope_attention_factor: float = option(
        0.0,
        "What yarn and longrope multiply cosines and sines by; in mla the whole score by its square.",
        least=0,
        most=1e6,
        filled="0.1 ln(factor) + 1; longrope: the root of 1 + ln(factor) / ln(original context)",
        shape_free=True,
    )
    rope_short_factors: tuple[float, ...] = ()  # longrope: what the period of each turned pair is multiplied by
    rope_long_factors: tuple[float, ...] = ()  # the same in sequences longer than the original context
    rope_global_layers: tuple[str, ...] = option(
        ("on",),
        "whether a layer turns as --rope-base and --rope-scaling say, a pattern over the depth; the others turn unstretched (OLMo 3).",
        choices=SWITCH,
        shape_free=True,
    )
    tied_head: bool = option(True, "The output head is the embedding; otherwise a matrix of its own.")
    head_size: int = option(
        0, "Features of a head of attention, block-sparse, mla and gated-deltanet.", least=0, filled="--dim over --heads"
    )
    norms: Literal["pre", "post", "sandwich"] = option(
        "pre", "Where norms stand: before a mixer or feed-forward, after it (OLMo 2), or both."
    )
    embedding_multiplier: float = option(1.0, "What embeddings are multiplied by (Granite).", over=0, most=1e6, shape_free=True)
    residual_multiplier: float = option(1.0, "What a mixer or feed-forward adds is multiplied by.", over=0, most=1e6, shape_free=True)
    logits_divisor: float = option(1.0, "What logits are divided by.", over=0, most=1e6, shape_free=True)
    init_std: float = option(0.02, "Standard deviation of the initial weights.", shape_free=True, inert=True)

    @property
    def block_norms(self) -> tuple[str, ...]:
        """The norms of a block by name, those before a mixer and a feed-forward and those after."""
        before, after = ("mixer_norm", "ffn_norm"), ("mixer_post_norm", "ffn_post_norm")
        return {"pre": before, "post": after, "sandwich": (*before, *after)}[self.norms]

    @property
    def head_dim(self) -> int:
        """Features of one head, K."""
        return self.head_size or self.dim // self.heads

    @property
    def inner_dim(self) -> int:
        """Features of all query heads together, H K: the width unless heads have a size of their own."""
        return self.heads * self.head_dim

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
STRETCHING = ("rope_scaling", "rope_factor", "rope_original_len", "rope_low_freq_factor", "rope_high_freq_factor", "rope_attention_factor")
