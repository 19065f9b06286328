"""Model sizes: one row each, dim / layers / heads. The feed-forward width follows from `ffn_mult` (config.ffn_width)."""

from typing import NamedTuple


class Preset(NamedTuple):
    """Width, depth and query heads of a size; key/value heads equal query heads unless asked otherwise."""

    dim: int
    layers: int
    heads: int


PRESETS: dict[str, Preset] = {
    "tiny": Preset(128, 4, 4),
    "small": Preset(256, 6, 4),
    "medium": Preset(512, 12, 8),
    "large": Preset(1024, 16, 16),
    "xl": Preset(1536, 20, 16),
    "xxl": Preset(2048, 24, 16),
    "huge": Preset(2560, 32, 20),
    "max": Preset(4096, 32, 32),
}

DEFAULT_VOCAB_SIZE = 8192
DEFAULT_FFN_MULT = 2.67
FFN_MULTIPLE = 256
VOCAB_MULTIPLE = 64
