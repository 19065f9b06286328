"""Weights whose routers are far from a tie, so that neither rounding nor a small step changes which experts a token goes to.

A choice of experts jumps, and at a jump no two computations need agree. So in the cases with experts every token carries a code in
the first E features of the residual stream, one of the orders of E evenly spaced levels; the router of every layer reads it, and what
the layers write there is made small. A bias that is not zero gets so large for expert 0 that every token goes there, whatever its score;
but where experts are in groups it stays small, and the levels are uneven, since evenly spaced ones of two groups can have equal sums.
"""

import numpy as np

from smedjan_common.config import ModelConfig
from smedjan_common.model.ffns.experts import limited, load_names
from smedjan_common.model.params import parameter_table
from smedjan_common.reference import experts
from smedjan_common.reference import model as reference

Params = dict[str, np.ndarray]
UNEVEN = (-2.0, 0.7, 1.2, 1.9)  # the sums of the sigmoids of any two and of the other two are 0.3 apart


def separated(model: ModelConfig, params: Params) -> Params:
    """The same parameters where nothing routes; else with codes, and routers that read them."""
    if not load_names(model):
        return params
    rng, features, table = np.random.default_rng(5), model.experts, parameter_table(model)
    params = {name: value.copy() for name, value in params.items()}
    grouped = model.router == "bias" and limited(model)
    levels = np.array(UNEVEN) if grouped else np.linspace(-1.5, 1.5, features)
    params["embed.weight"][:, :features] = [rng.permutation(levels) for _ in params["embed.weight"]]
    for name, value in params.items():
        axes = table[name].axes
        if len(axes) > 1 and "embed" in axes[-2:-1]:  # it writes to the residual stream: [..., out, in]
            value[..., :features, :] *= 0.1
        elif name.endswith(".router.weight"):
            value *= 0.2
            value[:, :features] += np.eye(features, dtype=np.float32)
        elif name.endswith(".router.bias") and np.ptp(value):
            value *= 0.1
            value[0] += 0.1 if grouped else 1
    return params


def margin(model: ModelConfig, params: Params, tokens: np.ndarray) -> float:
    """The smallest distance, over tokens and layers, between the last chosen and the first not chosen expert's score."""
    smallest = np.inf
    for name, logits_NxE in zip(load_names(model), reference.router_logits(model, params, tokens), strict=True):
        bias = params.get(name.replace(".load", ".router.bias"))
        scores = experts.choice_scores(logits_NxE, bias)
        smallest = min(smallest, _gap(experts.within_groups(model, scores), model.experts_per_token))
        smallest = min(smallest, _gap(experts.group_scores(model, scores), model.expert_groups_per_token))
    return smallest


def _gap(scores_NxE: np.ndarray, taken: int) -> float:
    """The smallest distance between the last of the `taken` largest and the next one; inf where all are taken."""
    ranked = np.sort(scores_NxE, axis=-1)[:, ::-1]
    return float((ranked[:, taken - 1] - ranked[:, taken]).min()) if taken < ranked.shape[1] else np.inf
