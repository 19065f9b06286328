"""Mutations of mla: its tensors, its two norms, what turns and what does not, YaRN's scale, the absorbed form."""

from collections.abc import Callable

import numpy as np

from smedjan_common.model.params import parameter_table
from smedjan_common.reference import mla
from tests.conformance.cases import CASES
from tests.conformance.mutate import OFF, demand_decoding, demand_forward, demand_gradient, model_constant_off, on, swap, tensor_off

CASE, YARN, RANK, FACTORS = (CASES[f"mla-swiglu-mha{part}"] for part in ("", "-yarn", "-q-rank", "-heads-of-12-factors"))
TENSORS = [name for name in parameter_table(RANK.model) if ".0.mixer." in name]


def part_off(index: int, factor: float = OFF) -> Callable:
    """One of: queries without position, queries with, latents, turned keys."""
    return lambda right: (
        lambda *args, **kwargs: tuple(value * (factor if number == index else 1.0) for number, value in enumerate(right(*args, **kwargs)))
    )


def keys_and_values_swapped(right: Callable) -> Callable:
    return lambda config, params: right(config, params)[::-1]


def turns_the_key_one_late(right: Callable) -> Callable:
    return lambda x, config, start=0: right(x, config, start + (x.shape[2] == 1))


def sees_one_token_ahead(right: Callable) -> Callable:
    return lambda config, score, visible: right(config, score, np.tril(np.ones(visible.shape, bool), 1))


MUTATIONS = {
    # the norms take a factor of the whole tensor before them away: one element of it must be seen
    **{f"one element of {name} off": (on(demand_forward, RANK), tensor_off(name, (0,))) for name in TENSORS},
    "queries without position off": (on(demand_forward, CASE), swap(mla, "_project", part_off(0))),
    "queries with position off": (on(demand_forward, CASE), swap(mla, "_project", part_off(1))),
    "turned keys off": (on(demand_forward, CASE), swap(mla, "_project", part_off(3))),
    "keys turned one position late": (on(demand_forward, CASE), swap(mla, "rotate", turns_the_key_one_late)),
    "keys and values swapped": (on(demand_forward, CASE), swap(mla, "_up_weights", keys_and_values_swapped)),
    "norm of the latent left out": (on(demand_forward, CASE), swap(mla, "rms_norm", lambda right: lambda x, weight, eps: x * weight)),
    "scale without the rotary features": (
        on(demand_forward, CASE),
        swap(mla, "_weights", lambda right: lambda config, score, seen: right(config, score * 1.5**0.5, seen)),
    ),
    "yarn scales the rotary part only": (on(demand_forward, YARN), swap(mla, "plain_factor", lambda right: lambda config: 1.0)),
    "one factor for all": (on(demand_forward, FACTORS), model_constant_off("mla_plain_factor", 0)),
    "causal mask": (on(demand_forward, CASE), swap(mla, "_weights", sees_one_token_ahead)),
    "gradient with latents off": (on(demand_gradient, CASE), swap(mla, "_project", part_off(2))),
    "decoding with latents off": (on(demand_decoding, CASE), swap(mla, "_project", part_off(2))),
}
