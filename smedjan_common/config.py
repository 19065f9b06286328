"""What a model is (ModelConfig) and how it is trained (TrainConfig): frozen, validated, to and from JSON.

Both backends read these and nothing else. `validate()` refuses what cannot work before anything is allocated.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Self

from smedjan_common.errors import ConfigError, near
from smedjan_common.optimizers import OPTIMIZERS
from smedjan_common.presets import DEFAULT_FFN_MULT, DEFAULT_VOCAB_SIZE, FFN_MULTIPLE, PRESETS, VOCAB_MULTIPLE


class _Json:
    """Dataclass <-> dict of JSON values; unknown and missing keys are refused by name."""

    def to_dict(self) -> dict[str, Any]:
        return {f.name: list(v) if isinstance(v := getattr(self, f.name), tuple) else v for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for key in values:
            if key not in known:
                raise ConfigError(f"{cls.__name__} has no field {key!r}.", "The file may come from a newer smedjan.", near(key, known))
        for name, f in known.items():
            if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                raise ConfigError(f"{cls.__name__} lacks the field {name!r}.", "The file is incomplete.", "Restore it from a good copy.")
        config = cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        config._validate_stored()
        return config

    def validate(self) -> None:
        """Raises ConfigError for what cannot work."""
        raise NotImplementedError

    def _validate_stored(self) -> None:
        """As validate, for values that were written once, and must stay readable."""
        self.validate()


@dataclass(frozen=True)
class ModelConfig(_Json):
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
    # options of rows of smedjan_common.mixers; 0 of a size: worked out from the model, as the row says
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
        from smedjan_common.params import count_params

        return count_params(self)

    def validate(self) -> None:
        """Raises ConfigError, with the fix, for a model that cannot be built, or whose rotary settings do nothing."""
        from smedjan_common.mixers import MIXERS

        for name, (least, most, reason) in _RANGES.items():
            if not least < getattr(self, name) <= most:
                raise ConfigError(f"{_flag(name)} is {getattr(self, name)}.", f"It must be {reason}.", "Leave it out for the default.")
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
        for flag, names in (("--mixer", self.mixer), ("--ffn", self.ffn)):
            if len(names) > self.layers:
                raise ConfigError(
                    f"{flag} names {len(names)} layers, of which the model has only {self.layers}.",
                    f"{', '.join(names[self.layers :])} at the end of the pattern would be in no layer.",
                    f"Take --layers {len(names)} or a shorter pattern.",
                )

    def _validate_stored(self) -> None:
        """What a checkpoint must be, which is less: it may come from before the checks of `validate`."""
        from smedjan_common.mixers import FFNS, MIXERS

        for name in ("vocab_size", "dim", "layers", "heads", "kv_heads", "ffn_dim", "context_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{_flag(name)} is {getattr(self, name)}.", "It must be at least 1.", "Give a positive number.")
        _check_extents(self)
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
        for table, names, flag in ((MIXERS, self.mixer, "--mixer"), (FFNS, self.ffn, "feed-forward")):
            if not names:
                raise ConfigError(f"{flag} is empty.", "Every layer needs one.", f"Known: {', '.join(table)}.")
            for name in names:
                if name not in table:
                    raise ConfigError(f"{flag} {name!r} is unknown.", "It must be a row of the table.", near(name, table))
                table[name].validate(self)


@dataclass(frozen=True)
class TrainConfig(_Json):
    """How a model is trained. One optimizer step sees `batch_size` sequences of `seq_len` tokens."""

    steps: int
    batch_size: int
    seq_len: int
    lr: float
    seed: int = 0
    warmup: int = 0
    lr_schedule: str = "cosine"
    min_lr_ratio: float = 0.1
    decay_fraction: float = 0.2
    optimizer: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    muon_momentum: float = 0.95
    muon_steps: int = 5
    muon_nesterov: bool = True
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    grad_accum: int = 1
    gradient_checkpointing: str = "none"
    dtype: str = "float32"
    attention: str = "auto"
    deterministic: bool = False
    chunk_size: int = 64
    mask_documents: bool = False
    packing: str = "windows"
    z_loss: float = 0.0
    balance_loss: float = 0.01
    router_z_loss: float = 1e-3
    router_bias_rate: float = 1e-3

    def validate(self) -> None:
        """Raises ConfigError, with the fix, for a run that cannot work."""
        from smedjan_common.schedule import SCHEDULES

        for name in ("steps", "batch_size", "seq_len", "grad_accum", "chunk_size", "muon_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{_flag(name)} is {getattr(self, name)}.", "It must be at least 1.", "Give a positive number.")
        _check_extents(self)
        for name in ("lr", "eps"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ConfigError(f"{_flag(name)} is {getattr(self, name)}.", "It must be a positive number.", "Take --lr 1e-3, say.")
        for name in ("min_lr_ratio", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{_flag(name)} is {getattr(self, name)}.", "It must lie in 0 to 1.", "Leave it out for the default.")
        for name in ("beta1", "beta2", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"{_flag(name)} is {getattr(self, name)}.", "It must lie in 0 to 1, under 1.", "Leave it out for the default."
                )
        weights = ("z_loss", "balance_loss", "router_z_loss", "router_bias_rate")
        for name in ("weight_decay", "clip_norm", "warmup", "seed", *weights):
            if getattr(self, name) < 0 or not math.isfinite(getattr(self, name)):
                fix = "Take 0 or more." if name == "seed" else "Take 0 to switch it off."
                raise ConfigError(f"{_flag(name)} is {getattr(self, name)}.", "It must be finite and not negative.", fix)
        if self.batch_size % self.grad_accum:
            fits = [n for n in range(1, self.batch_size + 1) if self.batch_size % n == 0]
            raise ConfigError(
                f"--batch-size {self.batch_size} does not divide into --grad-accum {self.grad_accum} parts.",
                "Every part has the same number of sequences.",
                f"Take --grad-accum {min(fits, key=lambda n: abs(n - self.grad_accum))}.",
            )
        if self.warmup > self.steps:
            raise ConfigError(
                f"--warmup {self.warmup} is longer than --steps {self.steps}.", "The learning rate would never arrive.", "Lower --warmup."
            )
        for name, known in (
            ("lr_schedule", SCHEDULES),
            ("optimizer", OPTIMIZERS),
            ("gradient_checkpointing", GRADIENT_CHECKPOINTING),
            ("dtype", DTYPES),
            ("attention", ATTENTION),
            ("packing", PACKING),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{_flag(name)} {getattr(self, name)!r} is unknown.", "It must be a name of the list.", near(getattr(self, name), known)
                )

    def check_model(self, model: ModelConfig) -> None:
        """Raises ConfigError for what this model cannot do."""
        from smedjan_common.mixers import MIXERS

        for name in dict.fromkeys(model.mixer):
            if self.mask_documents and not MIXERS[name].documents:
                able = ", ".join(row.name for row in MIXERS.values() if row.documents)
                raise ConfigError(f"--mask-documents cannot be had with {name}.", MIXERS[name].about + ".", f"These can: {able}.")


ROPE_SCALINGS = ("none", "ntk", "yarn")
GRADIENT_CHECKPOINTING = ("none", "dots", "full")
DTYPES = ("float32", "bfloat16")
ATTENTION = ("auto", "fused", "plain")
PACKING = ("windows", "documents")
LINEAR_DECAYS = ("none", "fixed", "scalar")
LINEAR_FEATURE_MAPS = ("identity", "elu1")
LINEAR_NORMALIZERS = ("rmsnorm", "denominator")
ROUTERS = ("softmax", "bias")
MAX_EXTENT = 1 << 24  # of a whole number: a checkpoint with a larger one is read as damaged (checkpoint.manifest)
MAX_POSITION = 1 << 62  # the same of what counts steps or positions
MAX_LAYERS = 1024  # of a new model; beyond, listing its tensors takes minutes (DeepNet, 2022, has 1000 layers)
_UNBOUNDED = ("context_length", "rope_original_len", "steps", "seq_len", "warmup", "seed")  # up to MAX_POSITION
_RANGES = {  # over the first, up to the second: with more, periods of NTK-aware scaling overflow float32
    "rope_base": (1, 1e24, "over 1, up to 1e24"),
    "rope_factor": (-math.inf, 1e6, "over 1, up to 1e6"),  # what is too small is refused with the reason, below
    "norm_eps": (0, 1, "over 0, up to 1"),
}
CHECKPOINT_FORMATS = {"neutral": None, "orbax": "jax"}  # name -> the backend that alone reads it


def ffn_width(dim: int, ffn_mult: float) -> int:
    """Feed-forward width: dim * ffn_mult rounded up to a multiple of 256. Raises ConfigError for a multiple that gives none."""
    _check_extent("dim", dim)
    if not 0 < ffn_mult <= MAX_EXTENT:  # nan is not
        raise ConfigError(f"--ffn-mult is {ffn_mult}.", f"It must be over 0, up to {MAX_EXTENT}: the width over --dim.", "Take 2.67.")
    return math.ceil(dim * ffn_mult / FFN_MULTIPLE) * FFN_MULTIPLE


def default_lr(dim: int, optimizer: str = "adamw") -> float:
    """Peak learning rate by width, for AdamW 3e-4 * sqrt(4096 / dim) to two digits: 1.7e-3 at 128, 3e-4 at 4096 (Llama's)."""
    return float(f"{3e-4 * math.sqrt(4096 / dim) * OPTIMIZERS[optimizer].lr:.1e}")


def parse_pattern(text: str) -> tuple[str, ...]:
    """`ssm,ssm,attention` -> its names."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _check_extents(config: _Json) -> None:
    for f in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, f.name)
        if type(value) is int:
            _check_extent(f.name, value)


def _check_extent(name: str, value: int) -> None:
    most = MAX_POSITION if name in _UNBOUNDED else MAX_EXTENT
    if value > most:
        raise ConfigError(f"{_flag(name)} is {value}.", f"It must be at most {most}.", "Give a smaller number.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
