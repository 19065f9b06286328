"""How close is close enough; forward and gradient gates of a mixer in float32 live in its row (Tolerance).

A gate is never widened to get green. All are relative: largest difference over largest value for outputs, L2 for tensors.
"""

from typing import NamedTuple

from smedjan_common.model.spec import Tolerance


class Gates(NamedTuple):
    """Gates that do not belong to a row."""

    loss: float  # one loss, and a gradient's norm
    steps_loss: float  # losses along 20 optimizer steps
    steps_params: float  # parameters, moments and gradient norms along 20 steps: Adam divides tiny gradients by tiny roots
    one_op: float  # one tensor that a few operations made: after an optimizer step, or the same sum in another order
    same_arithmetic: float  # loss and whole gradient when the same sum is taken in another order: accumulation, checkpointing
    oracle: float  # logits and loss against transformers
    frequencies: float  # rope frequencies against transformers


FLOAT32 = Gates(loss=1e-5, steps_loss=5e-5, steps_params=5e-4, one_op=2e-6, same_arithmetic=1e-6, oracle=1e-5, frequencies=1e-6)

# bfloat16 compute has 8 bits: measured on GPUs by bench/conformance.py, not part of the suite on a CPU
BFLOAT16 = FLOAT32._replace(loss=1e-3, steps_loss=5e-3, steps_params=1e-1, same_arithmetic=5e-2)
BFLOAT16_TOLERANCE = Tolerance(forward=3e-2, gradient=5e-2)
