"""The tools of the mutation tests: checks that must catch (`demand_…`) and patches that break one side.

A row's own mutations are in mutations_<row>.py beside this file, as MUTATIONS: {name: (check, patch)}; test_mutations.py walks all of them.
For a check on a case: `on(demand_forward, CASES["…"])`.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import pytest

from smedjan_common.reference import model as reference
from tests.conformance import checks
from tests.conformance.cases import CASES, Case
from tests.conformance.compare import demand

OFF = 1.001  # one part in a thousand
GQA = CASES["attention-swiglu-gqa"]

Patch = Callable[[pytest.MonkeyPatch], None]


def demand_forward(backend: str, case: Case = GQA) -> None:
    demand(checks.forward(backend, case))


def demand_gradient(backend: str, case: Case = GQA) -> None:
    demand(checks.gradient(backend, case))


def demand_loss(backend: str, case: Case = GQA) -> None:
    demand(checks.loss(backend, case))


def demand_decoding(backend: str, case: Case = GQA) -> None:
    demand(checks.decoding(backend, case, [4, 4, 1, 4, 4]))


def demand_optimizer(backend: str, case: Case = GQA) -> None:
    demand(checks.optimizer(backend, case))


def tensor_off(name: str, element: tuple[int, ...] | None = None, by: float = OFF) -> Patch:
    """The reference computes with a tensor, or one element of it, that is a thousandth too large."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        plain = reference.forward

        def forward(config, params, tokens, documents=None):
            value = params[name].astype(np.float64)
            factor = np.full(value.shape, by if element is None else 1.0)
            if element is not None:
                factor[np.unravel_index(np.abs(value).argmax(), value.shape)] = by
            return plain(config, {**params, name: value * factor}, tokens, documents)

        monkeypatch.setattr(reference, "forward", forward)

    return patch


def model_constant_off(field: str, factor: float = OFF) -> Patch:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        plain = reference.forward
        monkeypatch.setattr(
            reference,
            "forward",
            lambda config, *rest: plain(
                dataclasses.replace(config, **{field: type(getattr(config, field))(getattr(config, field) * factor)}), *rest
            ),
        )

    return patch


def swap(owner: object, name: str, wrong: Callable) -> Patch:
    """`wrong(right)` takes the place of a function of the definition."""
    return lambda monkeypatch: monkeypatch.setattr(owner, name, wrong(getattr(owner, name)))


def on(check: Callable, case: Case) -> Callable:
    """`check` of a backend on a case."""
    return functools.partial(check, case=case)
