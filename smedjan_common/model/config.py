"""What a model is (ModelConfig): frozen, validated, to and from JSON.

`validate()` refuses what cannot work before anything is allocated.
"""

import math
from dataclasses import dataclass
from typing import Any, Self

from smedjan_common.errors import ConfigError, flag, near
from smedjan_common.model.json_fields import MAX_EXTENT, JsonFields, check_extent, check_extents
from smedjan_common.model.presets import DEFAULT_FFN_MULT, DEFAULT_VOCAB_SIZE, FFN_MULTIPLE, PRESETS, VOCAB_MULTIPLE
from smedjan_common.model.shape import ROPE_SCALINGS


@dataclass(frozen=True)
class ModelConfig(JsonFields):
    """A pre-norm decoder: embedding, `layers` blocks of (mixer, feed-forward), final norm, tied head."""

    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn_dim: int
    context_length: int = 1024
    mixer: tuple[str, ...] = ("attention",)
    ffn: tuple[str, ...] = ("swiglu",)
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_original_len: int = 0
    init_std: float = 0.02
    # options of rows of smedjan_common.model.mixers; 0 of a size: worked out from the model, as the row says
    qk_norm: bool = False
    window: int = 0
    linear_decay: str = "scalar"
    linear_feature_map: str = "identity"
    linear_normalizer: str = "rmsnorm"
    ssm_state: int = 128
    ssm_head_dim: int = 64
    ssm_expand: int = 2
    ssm_groups: int = 1
    conv_width: int = 4
    mla_kv_rank: int = 0
    mla_q_rank: int = 0
    mla_rope_dim: int = 0
    block_size: int = 64
    block_topk: int = 4
    rwkv_head_dim: int = 64
    experts: int = 0
    experts_per_token: int = 2
    shared_experts: int = 0
    expert_dim: int = 0
    router: str = "softmax"

    @classmethod
    def preset(cls, size: str, vocab_size: int = DEFAULT_VOCAB_SIZE, **changes: Any) -> Self:
        """The model of a named size; `changes` replace single values.

        `ffn_mult` may be given instead of `ffn_dim`; `kv_heads` follows `heads` unless it is given.
        Raises ConfigError for an unknown size or an impossible model.
        """
        if size not in PRESETS:
            raise ConfigError(f"There is no size {size!r}.", "Sizes are rows of a table.", near(size, [*PRESETS, "custom"]))
        return cls.build(vocab_size=vocab_size, **{**PRESETS[size]._asdict(), **changes})

    @classmethod
    def build(cls, *, vocab_size: int, dim: int, layers: int, heads: int, ffn_mult: float = DEFAULT_FFN_MULT, **changes: Any) -> Self:
        """A new model from its free choices: fills in `kv_heads` and `ffn_dim`, then validates. Raises ConfigError."""
        if layers > MAX_LAYERS:
            raise ConfigError(f"--layers is {layers}.", f"It must be at most {MAX_LAYERS}.", "Take fewer layers and a larger --dim.")
        changes.setdefault("kv_heads", heads)
        changes.setdefault("ffn_dim", ffn_width(dim, ffn_mult))
        config = cls(vocab_size=vocab_size, dim=dim, layers=layers, heads=heads, **changes)
        config.validate()
        config._check_new()
        return config

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

    def num_params(self) -> int:
        """Exact number of trained values (the tied head counts once)."""
        from smedjan_common.model.params import count_params

        return count_params(self)

    def validate(self) -> None:
        """Raises ConfigError, with the fix, for a model that cannot be built, or whose rotary settings do nothing."""
        from smedjan_common.model.mixers import MIXERS

        for name, (least, most, reason) in _RANGES.items():
            if not least < getattr(self, name) <= most:
                raise ConfigError(f"{flag(name)} is {getattr(self, name)}.", f"It must be {reason}.", "Leave it out for the default.")
        if not 0 <= self.init_std < math.inf:
            raise ConfigError(f"--init-std is {self.init_std}.", "It must be finite and over 0.", "Take 0.02.")
        self._validate_stored()
        if self.rope_original_len < 0:
            raise ConfigError(f"--rope-original-len is {self.rope_original_len}.", "It counts positions.", "Leave it out for the default.")
        if self.rope_scaling == "none" and self.rope_original_len:
            raise ConfigError(
                f"--rope-original-len {self.rope_original_len} would do nothing.",
                "--rope-scaling is none.",
                "Add --rope-scaling yarn and --rope-factor, or take --rope-original-len 0.",
            )
        if self.rope_scaling != "none" and not any(MIXERS[name].rope for name in self.mixer):
            raise ConfigError(
                f"--rope-scaling {self.rope_scaling} would do nothing.",
                f"The model has {', '.join(dict.fromkeys(self.mixer))}; no layer turns by position.",
                "Take --rope-scaling none (with --rope-factor 1 and --rope-original-len 0), or add --mixer attention.",
            )

    def _check_new(self) -> None:
        """Raises ConfigError for a new model that has less than was asked for or would never learn."""
        if self.init_std == 0:
            raise ConfigError("--init-std is 0.", "It must be finite and over 0: equal weights never part.", "Take 0.02.")
        for pattern, names in (("--mixer", self.mixer), ("--ffn", self.ffn)):
            if len(names) > self.layers:
                raise ConfigError(
                    f"{pattern} names {len(names)} layers, of which the model has only {self.layers}.",
                    f"{', '.join(names[self.layers :])} at the end of the pattern would be in no layer.",
                    f"Take --layers {len(names)} or a shorter pattern.",
                )

    def _validate_stored(self) -> None:
        """What a checkpoint must be, which is less: it may come from before the checks of `validate`."""
        from smedjan_common.model.ffns import FFNS
        from smedjan_common.model.mixers import MIXERS

        for name in ("vocab_size", "dim", "layers", "heads", "kv_heads", "ffn_dim", "context_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{flag(name)} is {getattr(self, name)}.", "It must be at least 1.", "Give a positive number.")
        check_extents(self)
        if self.dim % self.heads:
            fits = [h for h in range(1, self.dim + 1) if self.dim % h == 0 and self.dim // h % 2 == 0]
            closest = sorted(fits, key=lambda h: abs(h - self.heads))[:2]
            raise ConfigError(
                f"--dim {self.dim} does not divide into --heads {self.heads}.",
                "Every head gets the same number of features.",
                f"Take --heads {' or '.join(map(str, sorted(closest)))}." if closest else "Take an even --dim.",
            )
        if self.rope_scaling not in ROPE_SCALINGS:
            raise ConfigError(
                f"--rope-scaling {self.rope_scaling!r} is unknown.", "It names a formula.", near(self.rope_scaling, ROPE_SCALINGS)
            )
        if self.rope_scaling != "none" and self.rope_factor <= 1:
            raise ConfigError(
                f"--rope-factor {self.rope_factor:g} does not extend the context.",
                f"--rope-scaling {self.rope_scaling} stretches positions by a factor over 1.",
                "Take --rope-factor 4, say, or --rope-scaling none.",
            )
        if self.rope_scaling == "none" and self.rope_factor != 1:
            raise ConfigError(
                f"--rope-factor {self.rope_factor:g} would do nothing.", "--rope-scaling is none.", "Add --rope-scaling yarn (or ntk)."
            )
        for table, names, what in ((MIXERS, self.mixer, "--mixer"), (FFNS, self.ffn, "feed-forward")):
            if not names:
                raise ConfigError(f"{what} is empty.", "Every layer needs one.", f"Known: {', '.join(table)}.")
            for name in names:
                if name not in table:
                    raise ConfigError(f"{what} {name!r} is unknown.", "It must be a row of the table.", near(name, table))
                table[name].validate(self)


MAX_LAYERS = 1024  # of a new model; beyond, listing its tensors takes minutes (DeepNet, 2022, has 1000 layers)

_RANGES = {  # over the first, up to the second: with more, periods of NTK-aware scaling overflow float32
    "rope_base": (1, 1e24, "over 1, up to 1e24"),
    "rope_factor": (-math.inf, 1e6, "over 1, up to 1e6"),  # what is too small is refused with the reason, below
    "norm_eps": (0, 1, "over 0, up to 1"),
}


def ffn_width(dim: int, ffn_mult: float) -> int:
    """Feed-forward width: dim * ffn_mult rounded up to a multiple of 256. Raises ConfigError for a multiple that gives none."""
    check_extent("dim", dim)
    if not 0 < ffn_mult <= MAX_EXTENT:  # nan is not
        raise ConfigError(f"--ffn-mult is {ffn_mult}.", f"It must be over 0, up to {MAX_EXTENT}: the width over --dim.", "Take 2.67.")
    return math.ceil(dim * ffn_mult / FFN_MULTIPLE) * FFN_MULTIPLE


def parse_pattern(text: str) -> tuple[str, ...]:
    """`ssm,ssm,attention` -> its names."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
