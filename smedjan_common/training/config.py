"""How a model is trained (TrainConfig): frozen, validated, to and from JSON."""

import math
from dataclasses import dataclass

from smedjan_common.errors import ConfigError, flag, unknown
from smedjan_common.model.config import ModelConfig
from smedjan_common.model.json_fields import JsonFields, check_extents
from smedjan_common.model.mixers import MIXERS
from smedjan_common.training.optimizers import OPTIMIZERS
from smedjan_common.training.schedule import SCHEDULES


@dataclass(frozen=True)
class TrainConfig(JsonFields):
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
        for name in ("steps", "batch_size", "seq_len", "grad_accum", "chunk_size", "muon_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{flag(name)} is {getattr(self, name)}.", "It must be at least 1.", "Give a positive number.")
        check_extents(self)
        for name in ("lr", "eps"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ConfigError(f"{flag(name)} is {getattr(self, name)}.", "It must be a positive number.", "Take --lr 1e-3, say.")
        for name in ("min_lr_ratio", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{flag(name)} is {getattr(self, name)}.", "It must lie in 0 to 1.", "Leave it out for the default.")
        for name in ("beta1", "beta2", "muon_momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"{flag(name)} is {getattr(self, name)}.", "It must lie in 0 to 1, under 1.", "Leave it out for the default."
                )
        weights = ("z_loss", "balance_loss", "router_z_loss", "router_bias_rate")
        for name in ("weight_decay", "clip_norm", "warmup", "seed", *weights):
            if getattr(self, name) < 0 or not math.isfinite(getattr(self, name)):
                fix = "Take 0 or more." if name == "seed" else "Take 0 to switch it off."
                raise ConfigError(f"{flag(name)} is {getattr(self, name)}.", "It must be finite and not negative.", fix)
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
                raise unknown(flag(name), getattr(self, name), known)

    def check_model(self, model: ModelConfig) -> None:
        """Raises ConfigError for what this model cannot do."""
        for name in dict.fromkeys(model.mixer):
            if self.mask_documents and not MIXERS[name].documents:
                able = ", ".join(row.name for row in MIXERS.values() if row.documents)
                raise ConfigError(f"--mask-documents cannot be had with {name}.", MIXERS[name].about + ".", f"These can: {able}.")


GRADIENT_CHECKPOINTING = ("none", "dots", "full")

DTYPES = ("float32", "bfloat16")

ATTENTION = ("auto", "fused", "plain")

PACKING = ("windows", "documents")

CHECKPOINT_FORMATS = {"neutral": None, "orbax": "jax"}  # name -> the backend that alone reads it


def default_lr(dim: int, optimizer: str = "adamw") -> float:
    """Peak learning rate by width, for AdamW 3e-4 * sqrt(4096 / dim) to two digits: 1.7e-3 at 128, 3e-4 at 4096 (Llama's)."""
    return float(f"{3e-4 * math.sqrt(4096 / dim) * OPTIMIZERS[optimizer].lr:.1e}")
