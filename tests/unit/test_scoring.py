"""Windows, seams and sums: each token is scored once, after as much context as was promised, and no continuation is ever empty."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smedjan_common.backend import IGNORED
from smedjan_common.errors import DataError, NotFiniteError
from smedjan_common.inference.pieces import scores_in_pieces
from smedjan_common.inference.scoring import Scorer, seam, windows
from smedjan_common.inference.tally import Tally
from smedjan_common.tokenizer import Tokenizer

VOCAB = 50


class Summing:
    """A backend that sees all tokens of a row: log p(target) = -(sum of the tokens so far + 7 target + position) / 1000; the target that
    the sum so far names is the most probable one. `shapes`: those of all inputs it was given."""

    def __init__(self):
        self.shapes, self.rows = [], 0

    def describe(self):
        return SimpleNamespace(kind="cpu")

    def score(self, params, inputs, targets, documents=None, top=0):
        self.shapes.append(inputs.shape)
        self.rows += int((targets != IGNORED).any(axis=(1, 2)).sum())
        sums = np.cumsum(inputs, axis=1).ravel()

        def piece(places, chosen):
            nothing = np.zeros((len(places), top))
            return -(sums[places] + 7 * chosen) / 1000 * params, sums[places] % VOCAB == chosen, nothing, nothing

        return scores_in_pieces(targets, VOCAB, top, piece)


def by_hand(ids, begin, at):
    return -(sum(ids[begin:at]) + 7 * ids[at]) / 1000


@given(length=st.integers(0, 60), context=st.integers(1, 20), share=st.floats(0, 1), first=st.integers(1, 60))
def test_each_token_is_in_one_window_with_the_context_that_the_stride_promises(length, context, share, first):
    stride = max(1, round(share * context))
    found = list(windows(length, context, stride, first))
    assert [at for window in found for at in range(window.first, window.end)] == list(range(first, length))
    for number, window in enumerate(found):
        assert 0 <= window.begin < window.first < window.end
        assert window.end - 1 - window.begin <= context
        before = window.first - window.begin
        assert before == window.first or window.end - 1 - window.begin == context, "only the beginning of a text has a shorter window"
        assert number == 0 or before > context - stride


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=9),
    st.integers(1, 33),
    st.floats(0, 1),
    st.sampled_from([1, 16, 64, 4096]),
)
@settings(max_examples=60)
def test_documents_are_scored_in_their_order_whatever_the_batches(lengths, context, share, batch_tokens):
    stride = max(1, round(share * context))
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, VOCAB, length) for length in lengths]
    backend = Summing()
    found = Scorer(backend, 1, context, batch_tokens).documents(documents, stride)
    for ids, logprobs in zip(documents, found, strict=True):
        wanted = [by_hand(ids, window.begin, at) for window in windows(len(ids), context, stride) for at in range(window.first, window.end)]
        assert np.allclose(logprobs, wanted, rtol=0, atol=1e-5)
    assert all(math.log2(rows).is_integer() and (length == context or math.log2(length).is_integer()) for rows, length in backend.shapes)
    assert all(rows == 1 or rows * length <= batch_tokens for rows, length in backend.shapes)


def test_a_long_pair_loses_the_left_of_its_context_and_none_of_its_continuation():
    scorer, context = Scorer(Summing(), 1, context=8), list(range(1, 21))
    short, long = list(range(3)), list(range(20))
    fits, cut, over = scorer.continuations([(context[:3], short), (context, short), (context, long)])
    assert (fits.tokens, fits.cut) == (3, 0)
    assert fits.logprob == pytest.approx(sum(by_hand(context[:3] + short, 0, at) for at in range(3, 6)))
    ids = context + short
    assert (cut.tokens, cut.cut) == (3, len(ids) - 9)
    assert cut.logprob == pytest.approx(sum(by_hand(ids, len(ids) - 9, at) for at in range(len(ids) - 3, len(ids))))
    assert over.tokens == 20


def test_continuations_of_one_token_share_the_row_of_their_context():
    backend = Summing()
    pairs = [([1, 2, 3], [token]) for token in (5, 6, 7)] + [([4, 4], [8, 9])]
    found = Scorer(backend, 1, context=32).continuations(pairs)
    assert backend.rows == 2
    for (context, continuation), one in zip(pairs, found, strict=True):
        ids = context + continuation
        wanted = sum(by_hand(ids, 0, at) for at in range(len(context), len(ids)))
        assert one.logprob == pytest.approx(wanted)
        assert one.tokens == len(continuation)
    assert [one.greedy for one in found] == [False, True, False, False]


def test_long_documents_are_scored_in_lots_and_each_token_is_told_once():
    documents = [np.arange(500) % VOCAB, np.arange(7), np.arange(3000) % VOCAB]
    scorer, told = Scorer(Summing(), 1, context=4, batch_tokens=16), []
    scorer.progress = told.append
    found = scorer.documents(documents, stride=2)
    assert sum(told) == 499 + 6 + 2999
    for ids, logprobs in zip(documents, found, strict=True):
        its = [(window.begin, at) for window in windows(len(ids), 4, 2) for at in range(window.first, window.end)]
        assert np.allclose(logprobs, [by_hand(ids, *one) for one in its], rtol=0, atol=1e-5)


def test_a_model_that_gives_no_numbers_is_told():
    with pytest.raises(NotFiniteError, match="no number"):
        Scorer(Summing(), math.nan, context=8).documents([np.array([1, 2, 3])])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """It has tokens for "Answer", " Answer", "the end" and others that span a join."""
    return Tokenizer.train_from_texts(["Answer the end, Answer the end, the answer ends. "] * 50, vocab_size=300)


def test_a_seam_between_tokens_moves_nothing_but_white_space(tokenizer: Tokenizer):
    for context in ("Answer", "Answer "):
        found = seam(tokenizer, context, [" the end"] if context[-1] != " " else ["the end"], prefix=[tokenizer.eot_id])
        assert found.context == [tokenizer.eot_id, *tokenizer.encode("Answer")]
        assert found.moved == 0
        assert tokenizer.decode(found.continuations[0]) == " the end"


def test_a_token_over_the_seam_leaves_no_continuation_empty(tokenizer: Tokenizer):
    """lm-eval takes what comes after as many tokens as the context has: here that is nothing."""
    assert len(tokenizer.encode("Answer")) == 1
    found = seam(tokenizer, "the Ans", ["wer", "werther", "x"], prefix=[])
    assert found.moved > 0
    texts = [tokenizer.decode(found.context + ids) for ids in found.continuations]
    assert texts == ["the Answer", "the Answerther", "the Ansx"]
    assert all(found.continuations)
    assert found.continuations[0] != tokenizer.encode("wer"), "the text is encoded as it would stand in a document"


@given(st.text("Answer thed,é\n", max_size=12), st.lists(st.text("Answer thed,é\n", min_size=1, max_size=6), min_size=1, max_size=3))
def test_no_text_is_lost_at_a_seam(tokenizer: Tokenizer, context: str, continuations: list[str]):
    found = seam(tokenizer, context, continuations, prefix=[tokenizer.eot_id])
    for text, ids in zip(continuations, found.continuations, strict=True):
        assert len(ids) > 0
        assert tokenizer.decode([*found.context[1:], *ids]) == context + text


def test_an_empty_continuation_is_refused(tokenizer: Tokenizer):
    with pytest.raises(DataError, match="continuation is empty"):
        seam(tokenizer, "Answer", ["x", ""], prefix=[])


def test_a_continuation_that_the_tokenizer_leaves_out_has_a_token_all_the_same():
    """As normalizers of others do: here white space at the end of a text."""
    stripping = SimpleNamespace(encode=lambda text: [ord(letter) for letter in text.rstrip()])
    assert seam(stripping, "ab", [" ", " c"], [0]) == ([0, ord("a")], [[ord("b")], [ord("b"), ord(" "), ord("c")]], 1)
    with pytest.raises(DataError, match="has no token"):
        seam(stripping, "", [" "], [0])


def test_figures_of_two_documents_by_hand():
    tally = Tally()
    tally.add(np.array([-1.0, -2.0], np.float32), num_bytes=4, words=1, end=-0.5)
    tally.add(np.array([-3.0], np.float32), num_bytes=6, words=2, end=-1.5)
    assert (tally.documents, tally.nats, tally.tokens, tally.bytes, tally.words) == (2, 6.0, 3, 10, 3)
    assert tally.loss == 2.0
    assert tally.loss_with_ends == pytest.approx(8 / 5)
    assert tally.perplexity == pytest.approx(math.exp(2))
    assert tally.word_perplexity == pytest.approx(math.exp(2))
    assert tally.bits_per_byte == pytest.approx(6 / math.log(2) / 10)
    assert tally.bits_per_byte_with_ends == pytest.approx(8 / math.log(2) / 10)
    assert tally.loss_error == pytest.approx(math.sqrt(2 * ((3 - 2 * 2) ** 2 + (3 - 2 * 1) ** 2)) / 3)
    assert tally.bits_per_byte_error == pytest.approx(math.sqrt(2 * ((3 - 0.6 * 4) ** 2 + (3 - 0.6 * 6) ** 2)) / 10 / math.log(2))


def test_the_standard_error_is_what_repeating_the_draw_of_documents_gives():
    """The spread of bits per byte over 400 draws of 200 documents, against the error that each draw tells of itself."""
    rng, found = np.random.default_rng(3), []
    for _ in range(400):
        tally = Tally()
        for size in rng.integers(5, 60, 200):
            tally.add(-rng.gamma(2, 0.7, size) * rng.uniform(0.7, 1.3), num_bytes=int(size) * 4, words=int(size))
        found.append((tally.bits_per_byte, tally.bits_per_byte_error))
    values, told = np.array(found).T
    assert told.mean() == pytest.approx(values.std(), rel=0.1)


def test_nothing_gives_no_figures():
    tally = Tally()
    assert (tally.loss, tally.perplexity, tally.bits_per_byte, tally.word_perplexity, tally.loss_error) == (None,) * 5
    tally.add(np.empty(0, np.float32), num_bytes=0, words=0, end=-1.0)
    assert tally.loss is None
    assert tally.loss_with_ends == 1.0
    tally.add(np.array([-2000.0]), num_bytes=1, words=1)
    assert tally.word_perplexity is None, "a float does not hold it"
