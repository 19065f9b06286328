"""Decoding through the state gives what the whole sequence at once gives, however the tokens are cut into pieces."""

import numpy as np
import pytest

from smedjan_common.errors import OutOfMemoryError
from smedjan_common.reference import model as reference
from tests.conformance import checks, subjects
from tests.conformance.cases import LENGTH, Case
from tests.conformance.compare import Difference, demand, demand_equal_bits, largest

CUTS = {"whole": [LENGTH], "step by step": [1] * LENGTH, "in chunks": [4, 4, 1, 4, 4], "prefill then steps": [13, 1, 1, 1, 1]}


def test_the_reference_step_by_step_equals_the_whole(case: Case):
    sides = (run(case.model, case.params, case.tokens) for run in (reference.recurrent_forward, reference.forward))
    demand([Difference("logits", largest(*sides), 1e-12)])


@pytest.mark.parametrize("cut", CUTS)
def test_feeding_tokens_equals_the_whole_sequence(backend: str, default_case: Case, cut: str):
    demand(checks.decoding(backend, default_case, CUTS[cut]))


def test_feeding_chunks_equals_the_whole_sequence_in_every_combination(backend: str, other_case: Case):
    demand(checks.decoding(backend, other_case, CUTS["in chunks"]))


def test_decoder_of_the_protocol_gives_the_logits_of_the_real_vocabulary(backend: str, default_case: Case):
    model, ids = default_case.model, default_case.tokens[0].tolist()
    expected = reference.forward(model, default_case.params, default_case.tokens[:1])[0, :, : model.vocab_size]
    decoder = subjects.backend(backend, model, default_case.train).decoder(default_case.params, max_len=24)
    first = decoder.feed(ids[:11])
    assert first.dtype == np.float32
    assert first.shape == (model.vocab_size,)
    rest = [decoder.feed([token]) for token in ids[11:]]
    demand([Difference("logits", largest(np.stack([first, *rest]), expected[10:]), default_case.tolerance.forward)])
    decoder.reset()
    demand_equal_bits({"logits after reset": decoder.feed(ids[:11])}, {"logits after reset": first})


def test_feeding_nothing_is_refused(backend: str, default_case: Case):
    decoder = subjects.backend(backend, default_case.model, default_case.train).decoder(default_case.params, max_len=4)
    with pytest.raises(AssertionError, match="nothing to feed"):
        decoder.feed([])


def test_a_full_device_is_told_with_the_flags_of_what_it_does(backend: str, default_case: Case, monkeypatch: pytest.MonkeyPatch):
    side = subjects.backend(backend, default_case.model, default_case.train)
    decoder = side.decoder(default_case.params, max_len=4)

    def full(*_):
        if backend == "mlx":
            raise RuntimeError("[malloc] Unable to allocate 1000 bytes.")
        import jax

        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1000 bytes.")

    monkeypatch.setattr(decoder, "_compiled", decoder._compiled._replace(feed=full))
    monkeypatch.setattr(side, "_eval_step", full)  # the backend serves other tests
    with pytest.raises(OutOfMemoryError, match="1000 bytes") as caught:
        decoder.feed([1])
    assert "--max-tokens" in caught.value.fix
    assert "--batch-size" not in caught.value.fix
    with pytest.raises(OutOfMemoryError, match="--batch-size"):
        side.eval_step({"params": {}, "slots": {}}, default_case.tokens[:, :-1], default_case.tokens[:, 1:])


def test_decoder_takes_the_parameters_of_a_state_as_they_are(backend: str, default_case: Case):
    side = subjects.backend(backend, default_case.model, default_case.train)
    state = side.init(default_case.params)
    ids = default_case.tokens[0, :5].tolist()
    sides = [side.decoder(params, max_len=24).feed(ids) for params in (side.params_of(state), default_case.params)]
    demand_equal_bits({"logits": sides[0]}, {"logits": sides[1]})
    demand_equal_bits(side.save(state).params, default_case.params, "after decoding: ")


def test_both_backends_decode_the_same_greedy_tokens(both_backends, default_case: Case):
    """40 greedy tokens; a case whose best two logits lie closer than rounding would say nothing, so the margin is demanded too."""
    case = default_case
    model, texts, margins = case.model, [], []
    for name in both_backends:
        decoder = subjects.backend(name, model, case.train).decoder(case.params, max_len=48)
        scores, text = decoder.feed(case.tokens[0, :4].tolist()), []
        for _ in range(40):
            text.append(int(scores.argmax()))
            margins.append(float(np.diff(np.sort(scores)[-2:])[0]))
            scores = decoder.feed(text[-1:])
        texts.append(text)
    assert min(margins) > 1e-4, "choose another case: its best two tokens are a tie"
    assert texts[0] == texts[1]
