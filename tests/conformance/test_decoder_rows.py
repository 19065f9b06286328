"""Rows of one decoder: each at its own position, past what its state holds too, whatever the others do."""

import numpy as np
import pytest

from smedjan_common.config import ModelConfig
from smedjan_common.inference.chunks import can_rewind
from smedjan_common.reference import attention, block_sparse, mla
from smedjan_common.reference import model as reference
from tests.conformance import subjects
from tests.conformance.cases import LENGTH, Case
from tests.conformance.compare import Difference, demand, demand_equal_bits, largest

HELD = 8  # positions that the state holds: less than half of the tokens that come
ROWS = 3


def sliding(monkeypatch: pytest.MonkeyPatch, case: Case) -> np.ndarray:
    """Logits of the definition, where no mixer by position sees more than the newest HELD positions, float64 [BATCH, LENGTH, V]."""
    weights, scores, visible = mla._weights, block_sparse.scores, attention._visible
    assert case.params, "drawn before anything is changed"

    def newest(config: ModelConfig, score_BxHxTxS: np.ndarray, visible_TxS: np.ndarray) -> np.ndarray:
        return weights(config, score_BxHxTxS, visible_TxS & (np.arange(score_BxHxTxS.shape[-1]) >= score_BxHxTxS.shape[-1] - HELD))

    def of_kept_blocks(config: ModelConfig, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        score_BxHkxTxJ, blocks = scores(config, query, key), -(-HELD // config.block_size)
        score_BxHkxTxJ[..., :-blocks] = -np.inf
        return score_BxHkxTxJ

    monkeypatch.setattr(attention, "_visible", lambda config, behind: visible(config, behind) & (behind < HELD))
    monkeypatch.setattr(mla, "_weights", newest)
    monkeypatch.setattr(block_sparse, "scores", of_kept_blocks)
    return reference.recurrent_forward(case.model, case.params, case.tokens)[..., : case.model.vocab_size]


def made(backend: str, case: Case, rows: int = ROWS):
    return subjects.backend(backend, case.model, case.train).decoder(case.params, max_len=HELD, rows=rows)


def test_rows_at_their_own_positions_give_the_definition_past_what_is_held(
    backend: str, default_case: Case, monkeypatch: pytest.MonkeyPatch
):
    demand(side_by_side(backend, default_case, sliding(monkeypatch, default_case)))


def test_rows_give_the_definition_in_every_combination(backend: str, other_case: Case, monkeypatch: pytest.MonkeyPatch):
    demand(side_by_side(backend, other_case, sliding(monkeypatch, other_case)))


def side_by_side(backend: str, case: Case, expected: np.ndarray) -> list[Difference]:
    """Logits of rows that are fed, and go on in turns, to the end of what comes."""
    decoder, rng, got = made(backend, case), np.random.default_rng(3), {}
    for row, fed in enumerate((12, 4)):  # in chunks of 4; the third of the first row overwrites what its own tokens see
        for start in range(0, fed, 4):
            got[row, start + 3] = decoder.feed(case.tokens[row, start : start + 4].tolist(), row)
    while min(decoder.position(row) for row in range(ROWS)) < LENGTH:
        positions = np.array([decoder.position(row) for row in range(ROWS)])
        active = (rng.random(ROWS) < 0.7) & (positions < LENGTH)
        logits = decoder.step(np.where(active, case.tokens[range(ROWS), positions % LENGTH], 0), active)
        got |= {(row, positions[row]): logits[row] for row in np.flatnonzero(active)}
    assert len(got) >= ROWS * LENGTH - 12
    want = np.stack([expected[at] for at in got])
    return [Difference(f"{backend} logits", largest(np.stack(list(got.values())), want), case.tolerance.forward)]


def test_a_row_has_the_same_bits_whatever_the_others_do(backend: str, default_case: Case):
    case, bits = default_case, []
    for others in ((), (0, 2)):
        decoder = made(backend, case)
        for row in others:
            decoder.feed(case.tokens[3, 4 * row : 4 * row + 4].tolist(), row)
        logits = [decoder.feed(case.tokens[1, :4].tolist(), 1)]
        for position in range(4, 12):
            tokens, active = case.tokens[[2, 1, 0], position], np.isin(np.arange(ROWS), (1, *others))
            logits.append(decoder.step(tokens, active)[1])
        bits.append(np.stack(logits))
    demand_equal_bits({"logits": bits[0]}, {"logits": bits[1]})


def test_rows_stay_go_back_and_move_bit_for_bit(backend: str, default_case: Case):
    """A row that is not active, one that is saved and loaded elsewhere, one that is reset, and one that is set back."""
    case, decoder = default_case, made(backend, default_case)
    prompt, only, rest = case.tokens[0, :4].tolist(), np.array([False, True, False]), case.tokens[0, 4:8]
    for row in range(ROWS):
        decoder.feed(prompt, row)
    kept = decoder.save(0)
    assert kept.nbytes > 0
    assert kept.position == 4
    first = [decoder.step(np.full(ROWS, token), only)[1] for token in rest]
    assert [decoder.position(row) for row in range(ROWS)] == [4, 8, 4]
    decoder.load(1, kept)
    assert decoder.position(1) == 4
    again = [decoder.step(np.full(ROWS, token), only)[1] for token in rest]
    demand_equal_bits({"after a load": np.stack(again)}, {"after a load": np.stack(first)})
    decoder.reset(1)
    assert decoder.position(1) == 0
    decoder.feed(prompt, 1)
    again = [decoder.step(np.full(ROWS, token), only)[1] for token in rest]
    demand_equal_bits({"after a reset": np.stack(again)}, {"after a reset": np.stack(first)})
    assert decoder.can_rewind == can_rewind(case.model)
    if decoder.can_rewind:
        assert decoder.rewind(1, 4)
        [decoder.step(np.full(ROWS, token), only) for token in case.tokens[1, 4:7]]  # something else
        assert decoder.rewind(1, 4)
        back = [decoder.step(np.full(ROWS, token), only)[1] for token in rest]
        demand_equal_bits({"after a rewind": np.stack(back)}, {"after a rewind": np.stack(first)})
        decoder.step(rest[:1].repeat(ROWS), only)
        assert not decoder.rewind(1, 4), "what it would need is overwritten"
        assert decoder.position(1) == 9


def test_rows_look_ahead_at_several_tokens_and_keep_what_they_want(backend: str, default_case: Case):
    """A row that goes on, one that goes on later, and one that does not look, past what it holds: not a bit of it changes."""
    case, T = default_case, 5
    expected = reference.recurrent_forward(case.model, case.params, case.tokens)[..., : case.model.vocab_size]
    looks, does_not = made(backend, case), made(backend, case)
    for decoder in (looks, does_not):
        [decoder.feed(case.tokens[0, start : start + 4].tolist(), 0) for start in (0, 4, 8)]
    looks.feed(case.tokens[1, :2].tolist(), 1)
    looks.feed(case.tokens[2, :1].tolist(), 2)
    ahead = np.stack([np.zeros(T, np.int32), case.tokens[1, 2 : 2 + T], case.tokens[2, 1 : 1 + T]])
    seen = looks.look(ahead, np.array([False, True, True]))
    assert [looks.position(row) for row in range(ROWS)] == [12, 2, 1]
    kept = 3 if looks.can_rewind else T
    looks.keep(np.array([0, kept, 0]))
    assert [looks.position(row) for row in range(ROWS)] == [12, 2 + kept, 1]
    tokens = np.array([case.tokens[0, 12], case.tokens[1, 2 + kept], case.tokens[2, 1]])
    after = looks.step(tokens, np.full(ROWS, True))
    got, want = [*seen[1], *seen[2], *after[1:]], [*expected[1, 2 : 2 + T], *expected[2, 1 : 1 + T], expected[1, 2 + kept], expected[2, 1]]
    demand([Difference(f"{backend} logits", largest(np.stack(got), np.stack(want)), case.tolerance.forward)])
    alone = does_not.step(tokens, np.array([True, False, False]))
    demand_equal_bits({"the row that did not look": after[0]}, {"the row that did not look": alone[0]})


def test_weights_that_are_joined_give_what_they_give_apart(backend: str, default_case: Case):
    """A GPU keeps them joined, a CPU does not."""
    case, weights = default_case, subjects.module(backend, "weights")
    model_class, array = subjects.module(backend, "model").Model, subjects.framework(backend).array
    state = model_class(case.model, subjects.on_device(backend, case.params)).init_state(2, HELD)
    step = subjects.framework(backend).compile(
        lambda kept, tokens, state: model_class(case.model, weights.views(case.model, kept)).step(tokens, state)[0]
    )
    logits = []
    for join in (True, False):
        kept = weights.decoding_weights(case.model, case.params, "float32", join)
        assert len(kept) < len(case.params) if join else kept.keys() == case.params.keys()
        logits.append(np.asarray(step(kept, array(case.tokens[:2, :3]), state)))
    demand([Difference("logits", largest(*logits), case.tolerance.forward)])


def test_what_feeds_a_row_copies_no_other_row():
    """XLA writes in place into a state that a program does not read: a prompt beside 64 others took as long as a step of all of them."""
    pytest.importorskip("jax")
    from smedjan_common.model.params import initial_params
    from smedjan_jax.decoder import JaxDecoder

    model = ModelConfig.build(vocab_size=64, dim=32, layers=2, heads=2, context_length=256)
    decoder = JaxDecoder(model, initial_params(model, 0), "float32", 256, rows=16)
    row, held = np.int32(3), sum(array.nbytes for arrays in decoder._layers for array in arrays.values())
    one = decoder._compiled.take(decoder._layers, row)
    put = decoder._compiled.put.lower(decoder._layers, row, one).compile().memory_analysis()
    assert put.alias_size_in_bytes == held
    assert put.temp_size_in_bytes < held / 16
