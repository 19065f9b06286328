"""Scores and logits of the protocol: those of the float64 reference over the model's own tokens, in both backends, whatever the pieces."""

import dataclasses

import numpy as np
import pytest

from smedjan_common.backend import IGNORED, OutOfMemoryError, Scores
from smedjan_common.inference import pieces
from smedjan_common.reference import model as reference
from smedjan_common.reference.loss import logsumexp
from tests.conformance import subjects
from tests.conformance.cases import CASES, DEFAULT_CASES, Case
from tests.conformance.compare import Difference, demand, largest

TOP = 5


def expected(case: Case, targets: np.ndarray, documents: np.ndarray | None = None) -> Scores:
    """By the definition. Logits are a fraction of a nat apart at least, so that float32 has the same order."""
    logits = reference.forward(case.model, case.params, case.tokens, documents)[..., : case.model.vocab_size]
    logprobs = logits - logsumexp(logits)[..., None]
    counted = targets != IGNORED
    picked = np.take_along_axis(logprobs, np.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    ids = np.argsort(-logits, axis=-1, kind="stable")[..., :TOP]
    shown = counted[..., None]
    return Scores(
        np.where(counted, picked, 0),
        counted & (logits.argmax(-1) == targets),
        np.where(shown, ids, 0),
        np.where(shown, np.take_along_axis(logprobs, ids, axis=-1), 0),
    )


def demand_scores(got: Scores, want: Scores, case: Case) -> None:
    gate = case.tolerance.forward
    demand(Difference(name, largest(getattr(got, name), getattr(want, name)), gate) for name in ("logprobs", "top_logprobs"))
    assert got.greedy.dtype == bool
    assert got.greedy.tolist() == want.greedy.tolist()
    assert got.top_ids.tolist() == want.top_ids.tolist()


def greedy_targets(case: Case, documents: np.ndarray | None = None) -> np.ndarray:
    """The targets of the first step, every third of which is made the most probable token: some are greedy, some do not count."""
    targets = case.batches[0][1].copy()
    best = reference.forward(case.model, case.params, case.tokens, documents)[..., : case.model.vocab_size].argmax(-1)
    targets[:, ::3] = np.where(targets[:, ::3] == IGNORED, IGNORED, best[:, ::3])
    assert (targets == IGNORED).any()
    return targets


def test_scores_equal_the_reference(backend: str, default_case: Case):
    targets = greedy_targets(default_case)
    got = subjects.backend(backend, default_case.model, default_case.train).score(
        default_case.params, default_case.tokens, targets, top=TOP
    )
    want = expected(default_case, targets)
    assert want.greedy.any()
    demand_scores(got, want, default_case)


def test_scores_are_those_of_a_head_of_its_own(backend: str):
    own = next(case for case in CASES.values() if not case.model.tied_head)
    targets = greedy_targets(own)
    side = subjects.backend(backend, own.model, own.train)
    demand_scores(side.score(own.params, own.tokens, targets, top=TOP), expected(own, targets), own)
    want = reference.forward(own.model, own.params, own.tokens)[..., : own.model.vocab_size]
    demand([Difference("logits", largest(side.logits(own.params, own.tokens), want), own.tolerance.forward)])


def test_scores_of_documents_that_are_kept_apart_equal_the_reference(backend: str):
    default_case = next(iter(DEFAULT_CASES.values()))
    documents = default_case.documents
    targets = greedy_targets(default_case, documents)
    side = subjects.backend(backend, default_case.model, default_case.train)
    got = side.score(default_case.params, default_case.tokens, targets, documents, top=TOP)
    demand_scores(got, expected(default_case, targets, documents), default_case)


def test_pieces_and_parameters_on_the_device_change_nothing(backend: str, default_case: Case, monkeypatch: pytest.MonkeyPatch):
    """A piece of 16 positions, the least, against one for all."""
    side, targets = subjects.backend(backend, default_case.model, default_case.train), greedy_targets(default_case)
    whole = side.score(default_case.params, default_case.tokens, targets, top=TOP)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1)
    parts = side.score(side.place(default_case.params), default_case.tokens, targets, top=TOP)
    demand_scores(parts, Scores(*(np.asarray(value) for value in whole)), default_case)
    nothing = side.score(default_case.params, default_case.tokens, np.full_like(targets, IGNORED))
    assert nothing.logprobs.tolist() == np.zeros(targets.shape).tolist()


def test_several_targets_of_a_position_are_scored_at_once(backend: str, default_case: Case):
    side, first = subjects.backend(backend, default_case.model, default_case.train), greedy_targets(default_case)
    second = np.where(first == IGNORED, 3, IGNORED)
    both = side.score(default_case.params, default_case.tokens, np.stack([first, second], axis=-1), top=2)
    for number, targets in enumerate((first, second)):
        alone = side.score(default_case.params, default_case.tokens, targets, top=2)
        demand([Difference("logprobs", largest(both.logprobs[..., number], alone.logprobs), default_case.gates.same_arithmetic)])
        assert both.greedy[..., number].tolist() == alone.greedy.tolist()
        assert both.top_ids[..., number, :].tolist() == alone.top_ids.tolist()


def test_equal_logits_go_to_the_smaller_id_and_padding_rows_are_no_tokens(backend: str, default_case: Case):
    """Rows of the head that are alike tie; rows past the vocabulary would win if they counted."""
    embed = np.tile(default_case.params["embed.weight"][:1], (default_case.model.padded_vocab_size, 1))
    embed[default_case.model.vocab_size :] *= 10
    params, inputs = {**default_case.params, "embed.weight": embed}, default_case.tokens
    side = subjects.backend(backend, default_case.model, default_case.train)
    got = side.score(params, inputs, np.full_like(inputs, 0), top=3)
    assert got.greedy.all()
    assert (got.top_ids == [0, 1, 2]).all()
    assert not side.score(params, inputs, np.full_like(inputs, 1)).greedy.any()
    assert np.abs(got.logprobs + np.log(default_case.model.vocab_size)).max() < 1e-5
    assert side.logits(params, inputs).shape == (*inputs.shape, default_case.model.vocab_size)


def test_logits_equal_the_reference_over_the_models_own_tokens(backend: str, default_case: Case, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1)
    side = subjects.backend(backend, default_case.model, default_case.train)
    got = side.logits(default_case.params, default_case.tokens)
    want = reference.forward(default_case.model, default_case.params, default_case.tokens)[..., : default_case.model.vocab_size]
    assert got.dtype == np.float32
    demand([Difference("logits", largest(got, want), default_case.tolerance.forward)])


def test_scores_of_both_backends_are_equal(both_backends, default_case: Case):
    targets = greedy_targets(default_case)
    sides = [subjects.backend(name, default_case.model, default_case.train) for name in both_backends]
    jax_side, mlx_side = (side.score(default_case.params, default_case.tokens, targets, top=TOP) for side in sides)
    demand_scores(jax_side, mlx_side, default_case)


def test_a_full_device_is_told_with_what_scoring_can_lower(backend: str, default_case: Case, monkeypatch: pytest.MonkeyPatch):
    side = subjects.make_backend(backend, default_case.model, dataclasses.replace(default_case.train, seed=9))

    def full(*_):
        if backend == "mlx":
            raise RuntimeError("[malloc] Unable to allocate 1000 bytes.")
        import jax

        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1000 bytes.")

    monkeypatch.setattr(side, "_hidden", full)
    with pytest.raises(OutOfMemoryError, match="1000 bytes") as caught:
        side.logits(default_case.params, default_case.tokens)
    assert "--batch-tokens" in caught.value.fix
