"""How a model is trained (TrainConfig): frozen, validated, to and from JSON. Each field is an option, and so a flag."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from smedjan_common.errors import ConfigError, nearest_divisor
from smedjan_common.model.adapters import check_targets
from smedjan_common.model.config import ModelConfig
from smedjan_common.model.ffns import experts
from smedjan_common.model.json_fields import JsonFields, check_extents
from smedjan_common.model.mixers import MIXERS, shared
from smedjan_common.model.options import REQUIRED, check_options, option, options
from smedjan_common.training import distillation, optimizers, preferences, schedule
from smedjan_common.training.adaptation import Adaptation
from smedjan_common.training.objectives import OBJECTIVES
from smedjan_common.training.optimizers import OPTIMIZERS
from smedjan_common.training.precision import FLOAT8_LEAST, FLOAT8_MULTIPLE, PRECISIONS, multiplied_in_float8
from smedjan_common.training.schedule import SCHEDULES


@dataclass(frozen=True)
class Basics:
    """What belongs to no row. One optimizer step sees `batch_size` sequences of `seq_len` tokens."""

    steps: int = option(REQUIRED, "Number of optimizer steps.", least=1, unset=None, filled="one pass over the data")
    batch_size: int = option(REQUIRED, "Sequences of one optimizer step, all --grad-accum parts together.", least=1, unset=16, fixed=True)
    seq_len: int = option(
        REQUIRED,
        "Tokens of one sequence; the model's context length. With --pretrained the default is the context of the weights.",
        least=1,
        unset=512,
        fixed=True,
    )
    lr: float = option(
        REQUIRED,
        "Peak learning rate.",
        over=0,
        unset=None,
        filled="by width: 3e-4 * sqrt(4096 / dim); for lion a fifth of it; with --lora-rank twice it",
    )
    warmup: int = option(0, "Steps over which the learning rate rises.", least=0, unset=None, filled="5% of --steps, at most 1000")
    lr_schedule: str = option("cosine", "How the learning rate falls after the warm-up.", choices=SCHEDULES)
    optimizer: str = option(
        "adamw",
        "muon orthogonalises the steps of hidden matrices and leaves the other tensors to adamw; lion keeps one moment instead of two.",
        choices=OPTIMIZERS,
    )
    weight_decay: float = option(0.1, "Decoupled weight decay of the matrices.", least=0, unset=None)
    clip_norm: float = option(1.0, "Clip the global norm of the gradients to this. 0: never.", least=0)
    grad_accum: int = option(
        1, "Compute the gradients in this many parts, one after the other, to save memory; the result is the same.", least=1
    )
    gradient_checkpointing: Literal["none", "dots", "full"] = option(
        "none", "Recompute activations to save memory: dots keeps the matrix products, full keeps only the inputs of blocks."
    )
    dtype: str = option(
        "float32",
        "Precision of the computation; parameters and optimizer are float32. float8: bfloat16, with large matrices multiplied in 8 bits"
        " (JAX, from Hopper on). auto: bfloat16 on a GPU, float32 on a CPU.",
        unset="auto",
        choices=PRECISIONS,
    )
    deterministic: bool = option(False, "Reproduce every bit on a GPU too, which is slower (docs/checkpoints.md); on a CPU runs always do.")
    mask_documents: bool = option(False, "Keep documents apart: nothing is read across the end of a document inside a sequence.")
    packing: Literal["windows", "documents"] = option(
        "windows",
        "How sequences are cut. windows: the text as one stream; documents: whole documents, rows filled by best fit.",
        fixed=True,
    )
    z_loss: float = option(0.0, "Weight of the squared log of the softmax's denominator in the loss (PaLM: 1e-4). 0: off.", least=0)
    seed: int = option(0, "Fixes the initial weights, the order of the data and the samples.", least=0, fixed=True)
    objective: str = option("lm", choices=OBJECTIVES)  # without help, so no flag: the command says it


@dataclass(frozen=True)
class TrainConfig(
    # fields come in the order of the rows, the last class's first
    Adaptation,
    experts.BiasRouter,
    experts.SoftmaxRouter,
    shared.Chunked,
    shared.Softmax,
    optimizers.Averaged,
    distillation.Distillation,
    preferences.Smoothed,
    preferences.Margin,
    optimizers.Orthogonal,
    schedule.Decay,
    Basics,
    JsonFields,
):
    """How a model is trained: Basics, and the options of every optimizer, schedule, mixer and router."""

    def validate(self) -> None:
        """Raises ConfigError, with the fix, for a run that cannot work."""
        check_options(self, options(TrainConfig))
        check_extents(self)
        if self.batch_size % self.grad_accum:
            raise ConfigError(
                f"--batch-size {self.batch_size} does not divide into --grad-accum {self.grad_accum} parts.",
                "Every part has the same number of sequences.",
                f"Take --grad-accum {nearest_divisor(self.batch_size, self.grad_accum)}.",
            )
        if self.adapters and not self.adapters.targets:
            raise ConfigError("--lora-targets is empty.", "Nothing would be trained.", "Leave it out, which adapts all linear maps.")
        if self.warmup > self.steps:
            raise ConfigError(
                f"--warmup {self.warmup} is longer than --steps {self.steps}.",
                "The learning rate would never reach its peak.",
                "Lower --warmup.",
            )

    def of_whole_model(self) -> "TrainConfig":
        """The same for a model without adapters, such as that which they were merged into."""
        return dataclasses.replace(self, lora_rank=0, lora_rows_from=0, lora_rows=0)

    def check_model(self, model: ModelConfig) -> None:
        """Raises ConfigError for what this model cannot do."""
        for name in dict.fromkeys(model.mixer):
            if self.mask_documents and not MIXERS[name].documents:
                able = ", ".join(row.name for row in MIXERS.values() if row.documents)
                raise ConfigError(f"--mask-documents does not work with {name}.", MIXERS[name].about + ".", f"It works with {able}.")
        if self.adapters:
            check_targets(model, self.adapters)
        if PRECISIONS[self.dtype].float8 and not multiplied_in_float8((model.dim, model.dim)):
            raise ConfigError(
                f"--dtype float8 does not work with --dim {model.dim}.",
                f"Matrices in float8 have sides of at least {FLOAT8_LEAST} that are multiples of {FLOAT8_MULTIPLE}.",
                "Take another --dim, or --dtype bfloat16.",
            )


_CHOICES = {name: found.choices for name, found in options(TrainConfig).items()}
GRADIENT_CHECKPOINTING, DTYPES = _CHOICES["gradient_checkpointing"], _CHOICES["dtype"]
ATTENTION, KERNELS, PACKING = _CHOICES["attention"], _CHOICES["kernels"], _CHOICES["packing"]

CHECKPOINT_FORMATS = {"neutral": None, "orbax": "jax"}  # name -> the backend that alone reads it


def default_lr(dim: int, optimizer: str = "adamw") -> float:
    """Peak learning rate by width, for AdamW 3e-4 * sqrt(4096 / dim) to two digits: 1.7e-3 at 128, 3e-4 at 4096 (Llama's)."""
    return float(f"{3e-4 * math.sqrt(4096 / dim) * OPTIMIZERS[optimizer].lr:.1e}")
