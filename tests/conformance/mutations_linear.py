"""Mutations of the mixer linear (see mutate.py)."""

from collections.abc import Callable

import numpy as np

from smedjan_common.model.params import parameter_table
from smedjan_common.reference import linear
from tests.conformance.cases import CASES
from tests.conformance.mutate import OFF, Patch, demand_decoding, demand_forward, demand_gradient, on, swap, tensor_off

PLAIN, GROUPED = CASES["linear-swiglu-mha"], CASES["linear-swiglu-gqa"]
FIXED, DIVIDED = CASES["linear-swiglu-mha-fixed-decay"], CASES["linear-swiglu-mha-denominator"]
TENSORS = [name for name in parameter_table(PLAIN.model) if name.startswith("layers.0.mixer.")]


def projected(change: Callable) -> Patch:
    """`change(q, k, v, g)` of what the definition projects."""
    return swap(linear, "_project", lambda right: lambda *arguments: change(*right(*arguments)))


def decays(change: Callable) -> Patch:
    return swap(linear, "_log_decay", lambda right: lambda *arguments: change(right(*arguments)))


DECAY_LATE = projected(lambda q, k, v, g: (q, k, v, np.roll(g, 1, axis=1)))
FORWARD, GRADIENT, DECODING = (on(check, PLAIN) for check in (demand_forward, demand_gradient, demand_decoding))
FORWARD_GROUPED, FORWARD_FIXED, FORWARD_DIVIDED = (on(demand_forward, case) for case in (GROUPED, FIXED, DIVIDED))

MUTATIONS = {
    # the norm takes a factor of q, k or v away: one element of them must be seen, all together only where nothing is normed
    **{f"one element of {name} off": (FORWARD, tensor_off(name, (0,))) for name in TENSORS},
    # the divided form hardly depends on the decay: numerator and denominator fade alike
    **{f"{name} off, divided": (FORWARD_DIVIDED, tensor_off(name)) for name in TENSORS if "proj" in name and "decay" not in name},
    "norm off": (FORWARD, tensor_off("layers.0.mixer.norm.weight")),
    "divisor of the decay": (FORWARD, decays(lambda g: g * 16 / 15.9)),
    "decay of the token before": (FORWARD, DECAY_LATE),
    "decoding with the decay of the token before": (DECODING, DECAY_LATE),
    "gradient without the decay": (GRADIENT, decays(lambda g: 0 * g)),
    "fixed decay": (FORWARD_FIXED, decays(lambda g: g * OFF)),
    "fixed decay of the next head": (FORWARD_FIXED, decays(lambda g: np.roll(g, 1, axis=-1))),
    "heads of the other group": (FORWARD_GROUPED, projected(lambda q, k, v, g: (q, k[:, :, ::-1], v[:, :, ::-1], g[:, :, ::-1]))),
    "elu plus another number": (FORWARD_DIVIDED, swap(linear, "_feature", lambda right: lambda config, z: right(config, z) + 1e-3)),
    "denominator": (FORWARD_DIVIDED, swap(linear, "_output", lambda right: lambda *given: right(*given[:-1], given[-1] * OFF))),
}
