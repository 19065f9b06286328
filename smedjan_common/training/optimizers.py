"""The optimizers, a row each: what is kept of a parameter, and the settings that suit one and not the others.

    adamw   Loshchilov & Hutter, 2019           mu, nu       every tensor
    muon    Jordan, 2024; Liu et al., 2025      mu           matrices; the other tensors as adamw does
    lion    Chen et al., 2023                   mu           every tensor

With --ema every parameter that moves has one more slot, its average (Averaged), whatever the optimizer.

How a tensor is treated stands in the parameter table alone: decay, lr_scale (0: it never moves, nothing is kept of it), and
matrix. The equations: smedjan_common.reference.optim.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from smedjan_common.errors import CheckpointError
from smedjan_common.model.adapters import Adapters, trained_table
from smedjan_common.model.options import option
from smedjan_common.model.parameter import ParamSpec
from smedjan_common.model.shape import Shape


@dataclass(frozen=True)
class Moments:
    """Options that every optimizer reads."""

    beta1: float = option(0.9, "Decay of the first moment; lion: weight of the momentum in its step.", least=0, under=1)
    beta2: float = option(0.95, "Decay of the second moment; lion: of the momentum.", least=0, under=1, unset=None)


@dataclass(frozen=True)
class Adaptive(Moments):
    """Options of `adamw`."""

    eps: float = option(1e-8, "Added to the root of the second moment; muon: to the norm of the momentum.", over=0)


@dataclass(frozen=True)
class Orthogonal(Adaptive):
    """Options of `muon`."""

    muon_momentum: float = option(0.95, "muon: decay of the momentum.", least=0, under=1)
    muon_steps: int = option(5, "muon: Newton-Schulz iterations of a step.", least=1)
    muon_nesterov: bool = option(True, "muon: look one step ahead along the momentum.")


@dataclass(frozen=True)
class Averaged:
    """Of the training, with any optimizer: a <- d a + (1 - d) p after each step, d = min(ema, (1 + t) / (10 + t)) where t were done before
    it, so that the initial values are soon forgotten (the warm-up of TensorFlow's ExponentialMovingAverage). a begins as p."""

    ema: float = option(
        0.0,
        "Keep a moving average of the weights with this decay, such as 0.999: it is validated and written to final/. 0: none.",
        least=0,
        under=1,
    )


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer.

    keeps(parameter) -> names of the arrays that are kept of a parameter that moves, float32 and of its shape.
    lr: its default peak learning rate over that of adamw. beta2, weight_decay: its defaults.
    options: its class of options, which TrainConfig inherits.
    """

    name: str
    options: type
    about: str
    keeps: Callable[[ParamSpec], tuple[str, ...]]
    lr: float = 1.0
    beta2: float = 0.95
    weight_decay: float = 0.1

    def slots(self, spec: ParamSpec) -> tuple[str, ...]:
        """Names of the arrays that are kept of a parameter; none of one that never moves."""
        return self.keeps(spec) if spec.lr_scale else ()


EMA = "ema"  # the slot of the average
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan's: they drive singular values into 0.7 to 1.2, the faster the smaller they are
MUON_RMS = 0.2  # root mean square of a step over the learning rate, as that of adamw is in practice (Liu et al., 2025)

OPTIMIZERS: dict[str, OptimizerSpec] = {
    row.name: row
    for row in (
        OptimizerSpec("adamw", Adaptive, "adaptive moments with decoupled weight decay", lambda spec: ("mu", "nu")),
        OptimizerSpec(
            "muon",
            Orthogonal,
            "orthogonalised momentum for matrices, adamw for the rest",
            lambda spec: ("mu",) if spec.matrix else ("mu", "nu"),
        ),
        # a step of one size for every value: the authors take a third to a tenth of adamw's rate, and as much more decay
        OptimizerSpec("lion", Moments, "sign of the momentum", lambda spec: ("mu",), lr=0.2, beta2=0.99, weight_decay=0.5),
    )
}


def slots_of(spec: ParamSpec, optimizer: str, ema: float = 0.0) -> tuple[str, ...]:
    """Names of the arrays that a train state keeps of a parameter; none of one that never moves."""
    return (*OPTIMIZERS[optimizer].slots(spec), *((EMA,) if ema and spec.lr_scale else ()))


def slot_names(config: Shape, optimizer: str, ema: float = 0.0, adapters: Adapters | None = None) -> dict[str, list[str]]:
    """slot -> names of the parameters that have it, in the order of the parameter table of the run."""
    slots: dict[str, list[str]] = {}
    for name, spec in trained_table(config, adapters).items():
        for slot in slots_of(spec, optimizer, ema):
            slots.setdefault(slot, []).append(name)
    return slots


def check_state(config: Shape, optimizer: str, tensors: Mapping[str, Any], ema: float = 0.0, adapters: Adapters | None = None) -> None:
    """Raises CheckpointError unless `tensors` (`{slot}.{parameter}` -> anything with .shape) are what the optimizer keeps."""
    table, slots = trained_table(config, adapters), slot_names(config, optimizer, ema, adapters)
    shapes = {f"{slot}.{name}": table[name].shape for slot, names in slots.items() for name in names}
    wrong = [f"{name} is missing" for name in shapes if name not in tensors]
    wrong += [f"{name} is none of its arrays" for name in tensors if name not in shapes]
    wrong += [
        f"{name} has shape {tuple(tensors[name].shape)}, not {shape}"
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if wrong:
        more, with_ema = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else "", f" with --ema {ema:g}" if ema else ""
        raise CheckpointError(
            f"The optimizer state does not fit --optimizer {optimizer}{with_ema}: {'; '.join(wrong[:3])}{more}.",
            "Each optimizer keeps its own arrays of each parameter.",
            "Resume with the optimizer of the checkpoint, or start a new run from its weights with --pretrained.",
        )
