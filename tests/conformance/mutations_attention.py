"""Mutations of attention's options: the head norms, and the edge of the window."""

import dataclasses
from collections.abc import Callable
from typing import Any

from smedjan_common.model.params import parameter_table
from smedjan_common.reference import attention
from tests.conformance.cases import CASES
from tests.conformance.mutate import demand_decoding, demand_forward, demand_gradient, on, swap, tensor_off

PARTS = CASES["attention-swiglu-mha-parts"]
PATTERNS = CASES["attention-swiglu-mha-patterns"]
NORM, WINDOW = CASES["attention-swiglu-mha-qk-norm"], CASES["attention-swiglu-mha-window"]
GATE = CASES["attention-swiglu-mha-gate"]
NORMS = [name for name in parameter_table(NORM.model) if name.endswith(("q_norm.weight", "k_norm.weight"))]


def wide_by(more: int) -> Callable:
    return lambda right: lambda config, behind: right(dataclasses.replace(config, window=config.window + more), behind)


def other(field: str, value: Any) -> Callable:
    """A pattern that says another thing of the layers."""
    return lambda right: lambda config, *args, **more: right(dataclasses.replace(config, **{field: value}), *args, **more)


def after_turning(right: Callable) -> Callable:
    """Heads that are normalised after they are turned: with a weight that differs between features that is not the same."""

    def project(config, params, x, start):
        plain = right(dataclasses.replace(config, qk_norm=False), params, x, start)
        query, key = (attention.rms_norm(h, params[f"{n}_norm.weight"], config.norm_eps) for n, h in zip("qk", plain[:2], strict=True))
        return query, key, plain[2]

    return project


def another_gate(change: Callable) -> Callable:
    """What heads give times change(sigmoid(x Wg^T))."""

    def output(params, x, mixed):
        gate = change(attention.sigmoid(attention.linear(params, "gate_proj", x)))
        return attention.linear(params, "o_proj", gate * mixed.reshape(*x.shape[:2], -1))

    return lambda right: output


MUTATIONS = {
    **{
        f"{name} off": (on(demand_forward, GATE), tensor_off(name))
        for name in parameter_table(GATE.model)
        if ".gate_proj." in name and ".mixer." in name
    },
    "no gate": (on(demand_forward, GATE), swap(attention, "output", another_gate(lambda gate: 1.0))),
    "a gate for each head": (
        on(demand_forward, GATE),
        swap(
            attention, "output", another_gate(lambda gate: gate.reshape(*gate.shape[:2], 4, 12)[..., :1].repeat(12, -1).reshape(gate.shape))
        ),
    ),
    "gradient without a gate": (on(demand_gradient, GATE), swap(attention, "output", another_gate(lambda gate: 1.0))),
    "decoding without a gate": (on(demand_decoding, GATE), swap(attention, "output", another_gate(lambda gate: 1.0))),
    **{f"{name} off": (on(demand_forward, NORM), tensor_off(name)) for name in NORMS},
    "norm after turning": (on(demand_forward, NORM), swap(attention, "project", after_turning)),
    "window one wider": (on(demand_forward, WINDOW), swap(attention, "_visible", wide_by(1))),
    "window one narrower": (on(demand_forward, WINDOW), swap(attention, "_visible", wide_by(-1))),
    "gradient with a window one wider": (on(demand_gradient, WINDOW), swap(attention, "_visible", wide_by(1))),
    "scores times one over the root of the head size": (
        on(demand_forward, CASES["attention-swiglu-mha-multipliers"]),
        swap(attention, "project", other("attention_multiplier", 0.0)),
    ),
    "head norms over each head, not all": (
        on(demand_forward, CASES["attention-swiglu-mha-post-norms"]),
        swap(
            attention,
            "_normed",
            lambda right: lambda config, weight, x: attention.rms_norm(x, weight.reshape(x.shape[2:]), config.norm_eps),
        ),
    ),
    "heads turn whole": (on(demand_forward, PARTS), swap(attention, "project", other("rope_dim", 0))),
    "the other part of a head turns": (
        on(demand_forward, PARTS),
        swap(attention, "rotate", lambda right: lambda x, *args: right(x[..., ::-1], *args)[..., ::-1]),
    ),
    "no layer is stretched": (on(demand_forward, PARTS), swap(attention, "project", other("rope_scaling", "none"))),
    "every layer turns": (on(demand_forward, PATTERNS), swap(attention, "project", other("rope_layers", ("on",)))),
    "no layer turns": (on(demand_forward, PATTERNS), swap(attention, "project", other("rope_layers", ("off",)))),
    "every layer has the window": (on(demand_forward, PATTERNS), swap(attention, "_visible", other("window", 5))),
    "decoding without the window": (on(demand_decoding, PATTERNS), swap(attention, "_visible", other("window", 0))),
    "decoding with a window one narrower": (on(demand_decoding, WINDOW), swap(attention, "_visible", wide_by(-1))),
}
