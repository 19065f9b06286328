"""Mutations of `rwkv` that its checks must catch."""

import numpy as np

from smedjan_common.model.params import parameter_table
from smedjan_common.reference import rwkv
from tests.conformance.cases import CASES
from tests.conformance.mutate import OFF, demand_decoding, demand_forward, demand_gradient, on, swap, tensor_off

CASE = CASES["rwkv-swiglu-mha"]
MINE = [name for name in parameter_table(CASE.model) if name.startswith("layers.1.mixer.")]


def update(change):
    """The recurrence with other arguments: change(S, w, k, v, a, b) -> the same six."""
    return swap(rwkv, "_update", lambda right: lambda *arguments: right(*change(*arguments)))


def prepared(change):
    """The projections with other results: change(r, w, k, v, a, b, gate) -> the same seven."""
    return swap(rwkv, "_project", lambda right: lambda *arguments: change(*right(*arguments)))


def v_first_of_the_layer_before(right):
    """v_first is the first layer's v: here every layer writes its own."""

    def project(config, params, x, previous, carried):
        found = right(config, params, x, previous, carried)
        carried["v_first"] = found[3].reshape(carried["v_first"].shape) * 1.001
        return found

    return project


def off(name):
    """A tensor a thousandth too large; what moves the output by less than a hundredth of itself, a hundredth too large."""
    weak = name.endswith((".x_w", ".r_k"))
    # a factor of all of k_k is taken away when k * k_k is normalised
    return tensor_off(name, (0,) if "k_k" in name else None, 1.01 if weak else OFF)


MUTATIONS = {
    **{f"{name} off": (on(demand_forward, CASE), off(name)) for name in MINE},
    "decay after the removal": (
        on(demand_forward, CASE),
        update(lambda S, w, k, v, a, b: (S * w[:, :, None, :], np.ones_like(w), k, v, a, b)),
    ),
    "decay off": (on(demand_forward, CASE), prepared(lambda r, w, *rest: (r, w**1.001, *rest))),
    "rate missing in what is put back": (on(demand_forward, CASE), prepared(lambda r, w, k, v, a, b, gate: (r, w, k, v, a, -a, gate))),
    "eps of the group norm": (on(demand_forward, CASE), lambda monkeypatch: monkeypatch.setattr(rwkv, "GROUP_NORM_EPS", 65e-5)),
    "bound of the decay": (on(demand_forward, CASE), lambda monkeypatch: monkeypatch.setattr(rwkv, "DECAY", 0.607)),
    "v_first of the layer before": (on(demand_forward, CASE), swap(rwkv, "_project", v_first_of_the_layer_before)),
    "gradient with the decay off": (on(demand_gradient, CASE), prepared(lambda r, w, *rest: (r, w**1.001, *rest))),
    "decoding with the decay off": (on(demand_decoding, CASE), prepared(lambda r, w, *rest: (r, w**1.001, *rest))),
}
