"""Learning from a teacher: what its options mean, and what a step then minimises. The teacher is a trained model that stays as it is.

    loss = (1 - alpha) CE + alpha T^2 KL(p || q)        means over the counted tokens, nats
    p, q: softmax of the logits of teacher and student over T, over the tokens that both know

KL is the forward one (Hinton et al., 2015): the student puts mass wherever the teacher has some. T^2 keeps the size of its gradient, so
alpha means the same at every T. CE is the usual cross-entropy, over all of the student's head. Rows that pad a head, and special tokens
that only one of the two has, take no part in KL: of those the targets alone say something. z_loss and the losses of routers stay.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from smedjan_common.model.options import option

ALPHA = 0.5  # where there is a teacher, and nothing is said of its share
METRICS = ("kl", "ce")  # what a step tells beside its loss


@dataclass(frozen=True)
class Distillation:
    """How a run learns from its teacher; distill_alpha is 0 where there is none."""

    distill_temperature: float = option(
        1.0, "With a teacher: what its logits and the student's are divided by before they are compared.", over=0
    )
    distill_alpha: float = option(
        0.0,
        "With a teacher: its share of the loss. 1: the texts say nothing but where to look.",
        least=0,
        most=1,
        unset=None,
        filled="0.5 with --teacher-checkpoint",
    )


class Mixed(NamedTuple):
    """The numbers of the formula. known: how many tokens, the first ones, both models know."""

    known: int
    temperature: float
    alpha: float

    def loss(self, ce: Any, kl: Any) -> Any:
        """What the two come to, as numbers or as arrays."""
        return (1 - self.alpha) * ce + self.alpha * self.temperature**2 * kl

    def told(self, ce: Any, kl: Any) -> dict[str, Any]:
        """What a step reports of them."""
        return {"loss": self.loss(ce, kl), "kl": kl, "ce": ce}
