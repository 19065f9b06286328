"""Mutations of `gated-deltanet` that its checks must catch."""

import numpy as np

from smedjan_common.model.params import parameter_table
from smedjan_common.reference import gated_deltanet
from tests.conformance.cases import CASES
from tests.conformance.mutate import demand_decoding, demand_forward, demand_gradient, model_constant_off, on, swap, tensor_off

CASE, GROUPED = CASES["gated-deltanet-swiglu-mha"], CASES["gated-deltanet-swiglu-gqa"]
OWN = CASES["gated-deltanet-swiglu-mha-own-heads"]
MINE = [name for name in parameter_table(CASE.model) if name.startswith("layers.1.mixer.")]


def update(change):
    """The recurrence with other arguments: change(S, decay, beta, k, v) -> the same five."""
    return swap(gated_deltanet, "_update", lambda right: lambda *arguments: right(*change(*arguments)))


def decay_after_the_correction(right):
    def update(S, decay, beta, k, v):
        return right(S, np.ones_like(decay), beta, k, v) * decay[..., None, None]

    return update


def key_heads_interleaved(right):
    """Value head h reads key head h % Hk instead of h // (H / Hk)."""

    def heads(config, features):
        (q, k, v), own = right(config, features), gated_deltanet.heads(config)
        wrong = np.arange(own.values).reshape(-1, own.keys).T.ravel()
        return q[..., wrong, :], k[..., wrong, :], v

    return heads


def scaled_by_values(right):
    def heads(config, features):
        q, k, v = right(config, features)
        return q * (q.shape[-1] / v.shape[-1]) ** 0.5, k, v

    return heads


MUTATIONS = {
    **{f"{name} off": (on(demand_forward, CASE), tensor_off(name)) for name in MINE},
    "decay after the correction": (on(demand_forward, CASE), swap(gated_deltanet, "_update", decay_after_the_correction)),
    "decay off": (on(demand_forward, CASE), update(lambda S, decay, *rest: (S, decay**1.001, *rest))),
    "beta off": (on(demand_forward, CASE), update(lambda S, decay, beta, *rest: (S, decay, beta * 1.001, *rest))),
    "norm of queries and keys": (on(demand_forward, CASE), lambda monkeypatch: monkeypatch.setattr(gated_deltanet, "NORM_EPS", 1e-3)),
    "eps of the norm": (on(demand_forward, CASE), model_constant_off("norm_eps", 1.1)),
    "grouping of the heads": (on(demand_forward, GROUPED), swap(gated_deltanet, "_heads", key_heads_interleaved)),
    "grouping of heads of their own": (on(demand_forward, OWN), swap(gated_deltanet, "_heads", key_heads_interleaved)),
    "queries scaled by the size of a value head": (on(demand_forward, OWN), swap(gated_deltanet, "_heads", scaled_by_values)),
    "decoding with heads interleaved": (on(demand_decoding, OWN), swap(gated_deltanet, "_heads", key_heads_interleaved)),
    "gradient with the decay off": (on(demand_gradient, CASE), update(lambda S, decay, *rest: (S, decay**1.001, *rest))),
    "decoding with the decay off": (on(demand_decoding, CASE), update(lambda S, decay, *rest: (S, decay**1.001, *rest))),
}
