"""Bugs of experts that somebody could write, and the check that must catch each (test_mutations.py walks them)."""

from collections.abc import Callable

import numpy as np

from smedjan_common.model.params import parameter_table
from smedjan_common.reference import experts
from smedjan_common.reference import model as reference
from tests.conformance import checks
from tests.conformance.cases import CASES, Case
from tests.conformance.compare import demand
from tests.conformance.mutate import OFF, Patch, demand_decoding, demand_forward, demand_gradient, model_constant_off, on, swap, tensor_off

SOFTMAX, BIAS, SHARED = (CASES[f"attention-experts-mha{form}"] for form in ("", "-bias", "-bias-shared-of-3"))
GROUPS, BIAS_GROUPS = (CASES[f"attention-experts-mha-{form}"] for form in ("groups", "bias-groups"))
GATED = CASES["attention-experts-mha-shared-gate"]
TENSORS = [name for name in parameter_table(SHARED.model) if ".0.ffn." in name and not name.endswith("router.bias")]


def demand_step(backend: str, case: Case) -> None:
    demand(checks.routing(backend, case))


def not_renormalised(right: Callable) -> Callable:
    """The weights of Switch: the probabilities among all experts."""

    def route(config, logits, bias):
        chosen, _ = right(config, logits, bias)
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        return chosen, np.take_along_axis(probabilities, chosen, axis=-1)

    return route


def renormalised(right: Callable) -> Callable:
    def route(config, logits, bias):
        chosen, weights = right(config, logits, bias)
        return chosen, config.routed_scaling_factor * _normalised(weights)

    return route


def bias_in_the_weights(right: Callable) -> Callable:
    def route(config, logits, bias):
        chosen, weights = right(config, logits, bias)
        return chosen, weights if bias is None else _normalised(np.take_along_axis(experts.choice_scores(logits, bias), chosen, axis=-1))

    return route


def softmax_of_the_sigmoids_logits(right: Callable) -> Callable:
    def route(config, logits, bias):
        chosen, _ = right(config, logits, bias)
        return chosen, _normalised(np.exp(np.take_along_axis(logits, chosen, axis=-1)))

    return route


def bias_ignored(right: Callable) -> Callable:
    return lambda logits, bias: right(logits, None if bias is None else 0 * bias)


def best_of_two(right: Callable) -> Callable:
    """Groups are ranked by one expert, as with the softmax router."""
    return lambda config, scores: scores.reshape(*scores.shape[:-1], config.expert_groups, -1).max(axis=-1)


def weights_of_the_wrong_place(right: Callable) -> Callable:
    """The second best expert gets the weight of the best."""

    def route(config, logits, bias):
        chosen, weights = right(config, logits, bias)
        return chosen, weights[..., ::-1]

    return route


def one_for_all(right: Callable) -> Callable:
    """Every expert computes with the weights of the first."""
    return lambda config, params, *rest: right(config, {n: v[:1].repeat(len(v), 0) if v.ndim == 3 else v for n, v in params.items()}, *rest)


def last_expert_off(right: Callable) -> Callable:
    def forward(config, params, *rest):
        factor = np.where(np.arange(config.experts) == config.experts - 1, OFF, 1.0)[:, None, None]
        return right(config, {n: v * factor if v.ndim == 3 else v for n, v in params.items()}, *rest)

    return forward


def _normalised(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum(axis=-1, keepdims=True)


def scaled(factor: float) -> Callable:
    return lambda right: lambda *args: factor * right(*args)


def shares_not_divided_by_k(right: Callable) -> Callable:
    return lambda config, logits: config.experts_per_token * right(config, logits)


def root_of_the_z_loss(right: Callable) -> Callable:
    return lambda logits: right(logits) ** 0.5


MUTATIONS: dict[str, tuple[Callable, Patch]] = {
    **{f"{name} off": (on(demand_forward, SHARED), tensor_off(name)) for name in TENSORS},
    **{
        f"one element of {name} off": (on(demand_forward, SHARED), tensor_off(name, (0,)))
        for name in TENSORS
        if "_proj" not in name or "shared" in name
    },
    "one expert off": (on(demand_forward, SOFTMAX), swap(experts, "forward", last_expert_off)),
    "weights not renormalised": (on(demand_forward, SOFTMAX), swap(experts, "route", not_renormalised)),
    "weights in the wrong order": (on(demand_forward, SOFTMAX), swap(experts, "route", weights_of_the_wrong_place)),
    "one expert for all": (on(demand_forward, SOFTMAX), swap(experts, "forward", one_for_all)),
    "one expert too many": (on(demand_forward, SOFTMAX), model_constant_off("experts_per_token", 1.5)),
    "bias in the weights": (on(demand_forward, BIAS), swap(experts, "route", bias_in_the_weights)),
    "bias without effect": (on(demand_forward, BIAS), swap(experts, "choice_scores", bias_ignored)),
    "softmax where sigmoids belong": (on(demand_forward, BIAS), swap(experts, "route", softmax_of_the_sigmoids_logits)),
    "groups without effect": (on(demand_forward, GROUPS), swap(experts, "within_groups", lambda right: lambda config, scores: scores)),
    "groups by their best one": (on(demand_forward, BIAS_GROUPS), swap(experts, "group_scores", best_of_two)),
    "weights renormalised": (on(demand_forward, GROUPS), swap(experts, "route", renormalised)),
    "sum of experts off": (on(demand_forward, GROUPS), model_constant_off("routed_scaling_factor", OFF)),
    "the gate of shared experts left out": (on(demand_forward, GATED), model_constant_off("shared_gate", 0)),
    "the gate of shared experts off": (on(demand_forward, GATED), tensor_off("layers.1.ffn.shared_gate.weight")),
    "gradient with the gate of shared experts off": (on(demand_gradient, GATED), tensor_off("layers.1.ffn.shared_gate.weight")),
    "shared experts left out": (on(demand_forward, SHARED), model_constant_off("shared_experts", 0)),
    "decoding with the bias without effect": (on(demand_decoding, BIAS), swap(experts, "choice_scores", bias_ignored)),
    "gradient without the balance loss": (on(demand_gradient, SOFTMAX), swap(experts, "balance_loss", scaled(0.0))),
    "gradient with the balance loss off": (on(demand_gradient, SOFTMAX), swap(experts, "balance_loss", scaled(1.01))),
    "gradient without the router's z-loss": (on(demand_gradient, SOFTMAX), swap(experts, "router_z_loss", scaled(0.0))),
    "gradient with the router's z-loss off": (on(demand_gradient, SOFTMAX), swap(experts, "router_z_loss", scaled(1.01))),
    "balance loss times k": (on(demand_step, SOFTMAX), swap(experts, "balance_loss", shares_not_divided_by_k)),
    "balance loss off": (on(demand_step, SOFTMAX), swap(experts, "balance_loss", scaled(OFF))),
    "router's z-loss without the square": (on(demand_step, SOFTMAX), swap(experts, "router_z_loss", root_of_the_z_loss)),
    "bias moved the other way": (
        on(demand_step, BIAS),
        swap(experts, "next_bias", lambda right: lambda bias, load, rate: right(bias, load, -rate)),
    ),
    "bias moved by the shortfall": (
        on(demand_step, BIAS),
        swap(experts, "next_bias", lambda right: lambda bias, load, rate: bias + rate * (load.mean() - load) / load.mean()),
    ),
    "bias moved by another rate": (
        on(demand_step, BIAS),
        swap(experts, "next_bias", lambda right: lambda bias, load, rate: right(bias, load, 1.01 * rate)),
    ),
    "loads of one sequence": (
        on(demand_step, SOFTMAX),
        swap(reference, "router_logits", lambda right: lambda config, params, tokens, *rest: right(config, params, tokens[:1], *rest)),
    ),
}
