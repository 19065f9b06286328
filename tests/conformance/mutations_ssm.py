"""Mutations of the mixer ssm (see mutate.py)."""

import dataclasses
from collections.abc import Callable

import numpy as np

from smedjan_common.model.params import parameter_table
from smedjan_common.reference import ssm
from smedjan_common.reference.norm import rms_norm
from tests.conformance.cases import CASES
from tests.conformance.mutate import OFF, Patch, demand_decoding, demand_forward, demand_gradient, on, swap, tensor_off

PLAIN, GROUPS = CASES["ssm-swiglu-mha"], CASES["ssm-swiglu-mha-two-groups"]
TENSORS = [name for name in parameter_table(PLAIN.model) if name.startswith("layers.0.mixer.")]


def convolved(change: Callable) -> Patch:
    """`change(x, B, C)` of what the definition convolves."""
    return swap(ssm, "_convolve", lambda right: lambda *arguments: change(*right(*arguments)))


def taps_reversed(right: Callable) -> Callable:
    return lambda config, params, *rest: right(config, {**params, "conv.weight": params["conv.weight"][:, ::-1]}, *rest)


def norm_before_gate(right: Callable) -> Callable:
    def output(config, params, y, gate):
        normed = rms_norm(y.reshape(gate.shape), params["norm.weight"], config.norm_eps)
        return (normed * gate / (1 + np.exp(-gate))) @ params["out_proj.weight"].T

    return output


def one_norm(right: Callable) -> Callable:
    return lambda config, *rest: right(dataclasses.replace(config, ssm_groups=1), *rest)


FORWARD, GRADIENT, DECODING, FORWARD_GROUPS = (
    on(demand_forward, PLAIN),
    on(demand_gradient, PLAIN),
    on(demand_decoding, PLAIN),
    on(demand_forward, GROUPS),
)

MUTATIONS = {
    **{f"{name} off": (FORWARD, tensor_off(name)) for name in TENSORS},
    # one rate alone shows little where its head's steps are small
    **{f"one element of {name} off": (FORWARD, tensor_off(name, (0,))) for name in TENSORS if "A_log" not in name},
    "taps reversed": (FORWARD, swap(ssm, "_convolve", taps_reversed)),
    "decoding with taps reversed": (DECODING, swap(ssm, "_convolve", taps_reversed)),
    "B and C swapped": (FORWARD, convolved(lambda x, B, C: (x, C, B))),
    "groups interleaved": (FORWARD_GROUPS, convolved(lambda x, B, C: (x, np.roll(B, 1, axis=2), np.roll(C, 1, axis=2)))),
    "state without the step": (
        FORWARD,
        swap(ssm, "_time", lambda right: lambda *a: (np.ones_like(right(*a)[0]), right(*a)[1])),
    ),
    "step": (FORWARD, swap(ssm, "_time", lambda right: lambda *a: tuple(each * OFF for each in right(*a)))),
    "gradient with the decay of the token before": (
        GRADIENT,
        swap(ssm, "_time", lambda right: lambda *a: (right(*a)[0], np.roll(right(*a)[1], 1, axis=1))),
    ),
    "norm before the gate": (FORWARD, swap(ssm, "_output", norm_before_gate)),
    "one norm over all groups": (FORWARD_GROUPS, swap(ssm, "_output", one_norm)),
}
