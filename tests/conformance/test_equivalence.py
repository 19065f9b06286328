"""Both backends compute what the float64 reference defines, for every combination: tree, forward, loss, every gradient."""

import numpy as np
import pytest

from smedjan_common.model.params import initial_params
from tests.conformance import checks, subjects
from tests.conformance.cases import Case
from tests.conformance.compare import demand, demand_equal_bits
from tests.conformance.conftest import installed


def test_train_state_holds_the_tensors_of_the_table_bit_for_bit(backend: str, case: Case):
    checks.tree(backend, case)


def test_tensors_are_found_under_the_attribute_path_of_their_name(backend: str, default_case: Case):
    checks.module_paths(backend, default_case)


def test_initial_values_are_the_same_bits_in_both_backends(both_backends, default_case: Case):
    start = initial_params(default_case.model, seed=3)
    states = []
    for name in both_backends:
        side = subjects.backend(name, default_case.model, default_case.train)
        states.append(side.save(side.init(start)).params)
    demand_equal_bits(*states)


def test_decode_state_is_what_the_row_says(backend: str, case: Case):
    checks.decode_state(backend, case)


def test_logits_equal_the_reference(backend: str, case: Case):
    demand(checks.forward(backend, case))


@pytest.mark.parametrize("length", [1, 48])
def test_logits_equal_the_reference_at_other_lengths(backend: str, default_case: Case, length: int):
    tokens = np.random.default_rng(length).integers(0, default_case.model.vocab_size, (2, length), dtype=np.int32)
    demand(checks.forward(backend, default_case, tokens=tokens))


def test_logits_of_both_backends_are_equal(both_backends, case: Case):
    demand(checks.forward("mlx", case, want="jax"))


def test_logits_of_a_sequence_do_not_depend_on_the_rest_of_the_batch(backend: str, default_case: Case):
    tokens = default_case.tokens
    others = np.concatenate([tokens[:1], tokens[::-1][: len(tokens) - 1]])
    first, second = (subjects.logits(backend, default_case.model, default_case.params, t)[:1] for t in (tokens, others))
    demand_equal_bits({"logits": second}, {"logits": first})


def test_loss_counts_exactly_the_targets_that_are_not_ignored(backend: str, default_case: Case):
    demand(checks.loss(backend, default_case))


def test_loss_of_a_batch_without_counted_targets_is_zero_and_finite(backend: str, default_case: Case):
    inputs, targets = default_case.batches[0]
    side = subjects.backend(backend, default_case.model, default_case.train)
    state, metrics = side.train_step(side.init(default_case.params), inputs, np.full_like(targets, -1), lr=0.0)
    read = side.read(metrics)
    assert {name: read[name] for name in ("loss", "grad_norm", "tokens")} == {"loss": 0.0, "grad_norm": 0.0, "tokens": 0.0}
    demand_equal_bits(side.save(state).params, default_case.params)


def test_every_gradient_equals_the_slope_of_the_reference(backend: str, default_case: Case):
    demand(checks.gradient(backend, default_case))


def test_every_gradient_equals_the_slope_of_the_reference_in_every_combination(other_case: Case):
    """One backend; the other one is held against it below."""
    demand(checks.gradient(installed()[0], other_case))


def test_every_gradient_of_both_backends_is_equal(both_backends, case: Case):
    demand(checks.gradients_between("mlx", "jax", case))
