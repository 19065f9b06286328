"""FLOPs of every row against a count of the float64 definition's own products: each matmul, einsum and outer product that it takes.

What is multiplied is an array that counts. A product with a parameter belongs to the parameters (2 FLOPs each), every other one to the
row's `flops`. Rows whose cost per token does not grow are counted over one step of their recurrence, the others over a whole sequence,
where of the T x T pairs only those that are seen count (their weight is not zero).
"""

import dataclasses
import math

import numpy as np
import pytest

from smedjan_common.config import ModelConfig
from smedjan_common.model.ffns import FFNS
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.params import initial_params
from smedjan_common.reference import model as definition

T = 32
MODEL = ModelConfig(64, 32, 2, 4, 4, 48, context_length=64, rwkv_head_dim=8, ssm_state=8, ssm_head_dim=16, block_size=4, block_topk=3)
MIXERS_AND_OPTIONS = [
    *((name, {}) for name in MIXERS),
    *((name, {"kv_heads": 2}) for name in ("attention", "block-sparse", "linear", "gated-deltanet")),
    ("attention", {"window": 8, "qk_norm": True}),
    ("attention", {"attention_gate": True, "kv_heads": 2}),
    ("gated-deltanet", {"delta_key_heads": 2, "delta_value_heads": 6, "delta_key_size": 10, "delta_value_size": 6}),
    ("mla", {"mla_kv_rank": 10, "mla_q_rank": 12, "mla_rope_dim": 6}),
    ("linear", {"linear_normalizer": "denominator", "linear_feature_map": "elu1"}),
    ("ssm", {"ssm_groups": 2, "ssm_expand": 1, "ssm_head_dim": 8, "conv_width": 3}),
]
FFNS_AND_OPTIONS = [
    ("swiglu", {}),
    ("experts", {}),
    ("experts", {"experts_per_token": 3, "shared_experts": 2, "router": "bias"}),
    ("experts", {"shared_experts": 1, "shared_gate": True}),
]


class Tally:
    """FLOPs of products with a parameter, and of others; what einsum did to pairs of positions (t, s), by subscripts."""

    def __init__(self):
        self.weights, self.others, self.pairs, self.seen = 0, 0, [], 0
        self.denominator = True  # linear's definition computes the denominator where it is not used, too


class Counting(np.ndarray):
    """An array whose products are counted in its tally; `weight` marks a parameter."""

    def __array_finalize__(self, other):
        self.tally, self.weight = getattr(other, "tally", None), getattr(other, "weight", False)

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **keywords):
        plain = [np.asarray(x) for x in inputs]
        keywords |= {"out": tuple(np.asarray(x) for x in out)} if out else {}
        result = getattr(ufunc, method)(*plain, **keywords)
        if ufunc is np.matmul:
            self._count(inputs, 2 * result.size * plain[0].shape[-1])
        elif ufunc is np.multiply and method == "__call__" and result.size > max(x.size for x in plain):  # an outer product
            self._count(inputs, 2 * result.size)
        return self._mark(result)

    def __array_function__(self, function, types, arguments, keywords):
        result = super().__array_function__(function, types, arguments, keywords)
        if function is np.einsum:
            self._einsum(*arguments)
        if function in (np.split, np.array_split, np.swapaxes):  # parts of a parameter are parameters
            return result
        return [self._mark(part) for part in result] if isinstance(result, list | tuple) else self._mark(result)

    def _einsum(self, subscripts, *operands):
        terms = subscripts.split("->")[0].split(",")
        extent = {letter: size for term, x in zip(terms, operands, strict=True) for letter, size in zip(term, x.shape, strict=True)}
        if {"t", "s"} <= set(extent):
            self.tally.pairs.append(2 * math.prod(size for letter, size in extent.items() if letter not in "bhts"))
            if terms[0] == "bhts":
                self.tally.seen = np.count_nonzero(np.asarray(operands[0]))
        elif subscripts != "bhk,bhk->bh" or self.tally.denominator:
            self._count(operands, 2 * math.prod(extent.values()))

    def _count(self, operands, flops):
        if any(getattr(x, "weight", False) for x in operands):
            self.tally.weights += flops
        else:
            self.tally.others += flops

    def _mark(self, result):
        if not isinstance(result, np.ndarray):
            return result
        marked = result.view(Counting)
        marked.tally, marked.weight = self.tally, False
        return marked


def counting(x: np.ndarray, tally: Tally, weight: bool = False) -> Counting:
    marked = np.asarray(x, np.float64).view(Counting)
    marked.tally, marked.weight = tally, weight
    return marked


def tallied(model: ModelConfig, part: str, call) -> tuple[Tally, dict]:
    """What `call(params, x)` counts, with the parameters of `part` of the last layer."""
    tally = Tally()
    tally.denominator = model.linear_normalizer == "denominator"
    start = definition.under(initial_params(model, 1), f"layers.{model.layers - 1}.{part}.")
    params = {name: counting(value, tally, weight=True) for name, value in start.items()}
    call(params, lambda *shape: counting(np.random.default_rng(0).standard_normal(shape), tally))
    return tally, start


@pytest.mark.parametrize(("name", "options"), MIXERS_AND_OPTIONS, ids=str)
def test_a_mixer_costs_what_the_products_of_its_definition_add_up_to(name: str, options: dict):
    model, row = dataclasses.replace(MODEL, mixer=(name,), **options), MIXERS[name]
    module, blocks = definition.mixer_module(model, 0), T // model.block_size

    def call(params, x):
        carried = {"v_first": x(1, model.dim)} if name == "rwkv" else {}
        if row.linear:
            state = {key: x(*value.shape) for key, value in module.initial_state(model, 1).items()}
            module.step(model, params, x(1, model.dim), state, carried)
        else:
            module.forward(model, params, x(1, T, model.dim), {})

    tally, start = tallied(model, "mixer", call)
    tokens = 1 if row.linear else T
    if name == "block-sparse":  # the scores of whole blocks: the definition takes them twice, and those of later blocks as well
        tally.others = tally.others / 2 * (blocks - 1) / 2 / blocks
    matrices = sum(value.size for key, value in start.items() if value.ndim > 1 and key not in ("conv.weight", "r_k"))
    taps = start["conv.weight"].size if name == "gated-deltanet" else 0  # its convolution is an einsum, ssm's a sum of products
    assert tally.weights == 2 * tokens * (matrices + taps)
    pair = sum(tally.pairs)
    counted, own = (tally.others + pair * tally.seen) / tokens, pair * model.heads / 2
    assert counted - own <= row.flops(model, T) <= counted  # of its own position a query sees a half, in the rows' count
    assert counted > 0


@pytest.mark.parametrize(("name", "options"), FFNS_AND_OPTIONS, ids=str)
def test_a_feed_forward_costs_what_the_products_of_its_definition_add_up_to(name: str, options: dict, monkeypatch):
    model = dataclasses.replace(MODEL, ffn=(name,), **{"experts": 5, "expert_dim": 24, **options} if name == "experts" else options)
    module, each, plain = definition.ffn_module(model, 0), [], definition.experts.ffn.forward

    def expert(config, params, x, carried):
        before = x.tally.weights
        result = plain(config, params, x, carried)
        each.append(x.tally.weights - before)
        return result

    monkeypatch.setattr(definition.experts.ffn, "forward", expert)
    tally, _ = tallied(model, "ffn", lambda params, x: module.forward(model, params, x(1, T, model.dim), {}))
    if name == "experts":  # the definition sends every token through every expert, and sets the weights of all but k to 0
        tally.weights -= (model.experts - model.experts_per_token) * each[0]
    assert tally.weights / T == 2 * FFNS[name].active(model)
    assert tally.others == 0
