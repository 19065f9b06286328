"""What a model is (ModelConfig): frozen, validated, to and from JSON.

`validate()` refuses what cannot work before anything is allocated.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Self

from smedjan_common.errors import ConfigError, flag, unknown
from smedjan_common.model.ffns import FFNS, experts
from smedjan_common.model.json_fields import MAX_EXTENT, JsonFields, check_extent, check_extents
from smedjan_common.model.mixers import MIXERS, attention, block_sparse, gated_deltanet, linear, mla, rwkv, ssm
from smedjan_common.model.options import check_options, options
from smedjan_common.model.params import count_params
from smedjan_common.model.presets import DEFAULT_FFN_MULT, DEFAULT_VOCAB_SIZE, FFN_MULTIPLE, PRESETS
from smedjan_common.model.shape import ROPE_SCALINGS, STRETCHING, Shape


@dataclass(frozen=True)
class ModelConfig(
    # fields come in the order of the rows, the last class's first
    experts.Options,
    gated_deltanet.Options,
    rwkv.Options,
    block_sparse.Options,
    mla.Options,
    ssm.Options,
    linear.Options,
    attention.Options,
    JsonFields,
):
    """A Shape with the options of every row; 0 of a size: worked out from the model, as the row says."""

    @classmethod
    def preset(cls, size: str, vocab_size: int = DEFAULT_VOCAB_SIZE, **changes: Any) -> Self:
        """The model of a named size; `changes` replace single values.

        `ffn_mult` may be given instead of `ffn_dim`; `kv_heads` follows `heads` unless it is given.
        Raises ConfigError for an unknown size or an impossible model.
        """
        if size not in PRESETS:
            raise unknown("--size", size, [*PRESETS, "custom"])
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
    def turns(self) -> bool:
        """Whether any layer turns by position."""
        return any((dims := MIXERS[name].rope_dims) and dims(self) for name in self.mixer)

    def at(self, layer: int) -> Self:
        """The model as the mixer of `layer` sees it: patterns of single layers are what they say of that one."""
        patterns = (self.rope_layers, self.window_layers, self.rope_global_layers)
        turns, windowed, stretched = (pattern[layer % len(pattern)] for pattern in patterns)
        if self.rope_layers == (turns,) and self.window_layers == self.rope_global_layers == ("on",):
            return self
        changes = {} if stretched == "on" else {name: options(Shape)[name].default for name in STRETCHING}
        window = self.window if windowed == "on" else 0
        return dataclasses.replace(self, **changes, rope_layers=(turns,), window_layers=("on",), rope_global_layers=("on",), window=window)

    def num_params(self) -> int:
        """Exact number of trained values (the tied head counts once)."""
        return count_params(self)

    def validate(self) -> None:
        """Raises ConfigError, with the fix, for a model that cannot be built, or whose rotary settings do nothing."""
        if not 0 <= self.init_std < math.inf:
            raise ConfigError(f"--init-std is {self.init_std}.", "It must be finite and over 0.", "Take 0.02.")
        check_options(self, options(Shape))
        self._validate_stored()
        if self.rope_original_len < 0:
            raise ConfigError(f"--rope-original-len is {self.rope_original_len}.", "It counts positions.", "Leave it out for the default.")
        if self.rope_scaling == "none" and self.rope_original_len:
            raise ConfigError(
                f"--rope-original-len {self.rope_original_len} would do nothing.",
                "--rope-scaling is none.",
                "Add --rope-scaling yarn and --rope-factor, or take --rope-original-len 0.",
            )
        factors = {"rope_low_freq_factor": self.rope_low_freq_factor, "rope_high_freq_factor": self.rope_high_freq_factor}
        for name, value in factors.items() if self.rope_scaling != "llama3" else ():
            if value != options(Shape)[name].default:
                raise ConfigError(
                    f"{flag(name)} would do nothing.", f"--rope-scaling is {self.rope_scaling}.", "Take --rope-scaling llama3."
                )
        if self.rope_attention_factor and self.rope_scaling not in ("yarn", "longrope"):
            what = f"--rope-attention-factor {self.rope_attention_factor:g} would do nothing."
            raise ConfigError(what, f"--rope-scaling is {self.rope_scaling}.", "Leave it out, or take --rope-scaling yarn.")
        if "off" in self.rope_global_layers and (self.rope_scaling == "none" or "on" not in self.rope_global_layers):
            raise ConfigError(
                f"--rope-global-layers {','.join(self.rope_global_layers)} would do nothing.",
                "All layers would turn alike.",
                "Add --rope-scaling, and leave it on in some layers, or leave --rope-global-layers out.",
            )
        if self.rope_scaling != "none" and not self.turns:
            raise ConfigError(
                f"--rope-scaling {self.rope_scaling} would do nothing.",
                f"The model has {', '.join(dict.fromkeys(self.mixer))}; no layer uses RoPE.",
                "Take --rope-scaling none (with --rope-factor 1 and --rope-original-len 0), or add --mixer attention.",
            )

    def _check_new(self) -> None:
        """Raises ConfigError for a new model that has less than was asked for or would never learn."""
        if self.init_std == 0:
            raise ConfigError("--init-std is 0.", "It must be finite and over 0: equal weights would stay equal.", "Take 0.02.")
        patterns = {"--mixer": self.mixer, "--ffn": self.ffn, "--rope-layers": self.rope_layers, "--window-layers": self.window_layers}
        patterns["--rope-global-layers"] = self.rope_global_layers
        for pattern, names in patterns.items():
            if len(names) > self.layers:
                raise ConfigError(
                    f"{pattern} names {len(names)} layers, of which the model has only {self.layers}.",
                    f"{', '.join(names[self.layers :])} at the end of the pattern would be in no layer.",
                    f"Take --layers {len(names)} or a shorter pattern.",
                )

    def _validate_stored(self) -> None:
        """What a checkpoint must be, which is less: it may come from before the checks of `validate`."""
        for name in ("vocab_size", "dim", "layers", "heads", "kv_heads", "ffn_dim", "context_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{flag(name)} is {getattr(self, name)}.", "It must be at least 1.", "Give a positive number.")
        check_extents(self)
        if not self.head_size and self.dim % self.heads:
            fits = [h for h in range(1, self.dim + 1) if self.dim % h == 0 and self.dim // h % 2 == 0]
            closest = sorted(fits, key=lambda h: abs(h - self.heads))[:2]
            raise ConfigError(
                f"--dim {self.dim} does not divide into --heads {self.heads}.",
                "Every head gets the same number of features.",
                f"Take --heads {' or '.join(map(str, sorted(closest)))}." if closest else "Take an even --dim.",
            )
        if self.head_size and (odd := [name for name in self.mixer if name in MIXERS and not MIXERS[name].head_size]):
            raise ConfigError(
                f"--head-size {self.head_size} does not go with {odd[0]}.",
                "Only attention, block-sparse, mla and gated-deltanet have heads of a size of their own.",
                "Leave --head-size out: heads share --dim evenly.",
            )
        if self.rope_scaling == "llama3" and (low := self.rope_low_freq_factor) >= (high := self.rope_high_freq_factor):
            raise ConfigError(
                f"--rope-low-freq-factor {low:g} is not under --rope-high-freq-factor {high:g}.",
                "Periods between the two are stretched in part.",
                "Take 1 and 4, as Llama 3.1 does.",
            )
        if self.rope_scaling not in ROPE_SCALINGS:
            raise unknown("--rope-scaling", self.rope_scaling, ROPE_SCALINGS)
        if self.rope_scaling == "longrope":
            self._validate_longrope()
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
                    raise unknown(what, name, table)
                check_options(self, table[name].own)
                table[name].validate(self)

    def _validate_longrope(self) -> None:
        """Its lists come with the weights: no flag says them."""
        turned = {dim for name in self.mixer if name in MIXERS and (dims := MIXERS[name].rope_dims) for dim in dims(self)}
        lists = self.rope_short_factors, self.rope_long_factors
        if any(2 * len(factors) != dim for factors in lists for dim in turned):
            what = (
                f"--rope-scaling longrope has {len(lists[0])} and {len(lists[1])} factors for {max(turned, default=0) // 2} turned pairs."
            )
            raise ConfigError(
                what, "They were found by a search, and come with weights alone.", "Take --rope-scaling yarn, or such weights."
            )
        if not all(0 < factor < math.inf for factor in (*lists[0], *lists[1])) or self.rope_original_len < 2:
            what = "--rope-scaling longrope has factors that are not over 0, or no original context of 2 positions or more."
            raise ConfigError(what, "They divide frequencies, and the context decides between them.", "Restore the file.")


MAX_LAYERS = 1024  # of a new model; beyond, listing its tensors takes minutes (DeepNet, 2022, has 1000 layers)


def ffn_width(dim: int, ffn_mult: float) -> int:
    """Feed-forward width: dim * ffn_mult rounded up to a multiple of 256. Raises ConfigError for a multiple that gives none."""
    check_extent("dim", dim)
    if not 0 < ffn_mult <= MAX_EXTENT:  # nan is not
        raise ConfigError(f"--ffn-mult is {ffn_mult}.", f"It must be over 0, up to {MAX_EXTENT}: the width over --dim.", "Take 2.67.")
    return math.ceil(dim * ffn_mult / FFN_MULTIPLE) * FFN_MULTIPLE


def parse_pattern(text: str) -> tuple[str, ...]:
    """`ssm,ssm,attention` -> its names."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
