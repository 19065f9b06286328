"""The engine over a decoder without a framework: each text is the one that it would be alone; rows, order, cancels, prefixes, errors."""

import numpy as np
import pytest

from smedjan_common.errors import ConfigError, NotFiniteError
from smedjan_common.inference.engine import Engine
from smedjan_common.inference.logprobs import log_softmax
from smedjan_common.inference.request import Request, Usage
from smedjan_common.inference.sampling import Sampling
from smedjan_common.inference.stats import Stats
from smedjan_common.tokenizer import Tokenizer
from tests.fakes.rows import FakeDecoder

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_from_texts(["naïve café — ein Märchen, 雪 and snow"] * 5, vocab_size=257)  # bytes and the end only


@pytest.fixture(autouse=True)
def short_texts_are_kept(monkeypatch):
    monkeypatch.setattr("smedjan_common.inference.prefixes.SHORTEST", 1)


def make(tokenizer, rows=1, **more):
    options = {name: more.pop(name) for name in ("reuse", "keep_bytes", "chunk", "score", "blocks") if name in more}
    decoder = FakeDecoder(tokenizer.vocab_size, rows, **more)
    return Engine(decoder, tokenizer, **options), decoder


def request(tokenizer, text="abc", max_tokens=12, **more):
    return Request(tokenizer.encode(text), max_tokens, **more)


def answers(engine, requests):
    """(text, last piece, ids) of each."""
    texts, lasts, ids = [""] * len(requests), [None] * len(requests), [[] for _ in requests]
    for number, piece in engine.run(requests):
        assert lasts[number] is None, "nothing comes after the last piece"
        texts[number] += piece.text
        ids[number] += [token.id for token in piece.tokens]
        if piece.finish_reason:
            lasts[number] = piece
    return list(zip(texts, lasts, ids, strict=True))


def alone(tokenizer, one, **options):
    return answers(make(tokenizer, **options)[0], [one])[0]


def script(tokenizer, text, prompt="a", end=True, **more):
    """One answer of a decoder that wants to write this text: (pieces, last piece)."""
    ids = tokenizer.encode(prompt + text) + ([tokenizer.eot_id] if end else [])
    engine, _ = make(tokenizer, script=ids)
    pieces = [piece for _, piece in engine.run([request(tokenizer, prompt, sampling=GREEDY, **{"max_tokens": 100, **more})])]
    return [piece.text for piece in pieces if piece.text], pieces[-1]


def test_it_stops_at_the_end_of_text_which_counts_and_is_not_shown(tokenizer):
    pieces, last = script(tokenizer, "a雪é!")
    assert pieces == ["a", "雪", "é", "!"]
    assert (last.finish_reason, last.usage) == ("stop", Usage(1, len("a雪é!".encode()) + 1, 0))


def test_the_most_tokens_is_honoured_and_told_as_length(tokenizer):
    pieces, last = script(tokenizer, "a雪", max_tokens=2)
    assert "".join(pieces) == "a\ufffd"
    assert (last.finish_reason, last.usage.completion_tokens) == ("length", 2)


def test_no_tokens_are_no_work(tokenizer):
    engine, decoder = make(tokenizer)
    [(text, last, _)] = answers(engine, [request(tokenizer, max_tokens=0)])
    assert (text, last.finish_reason, last.usage) == ("", "length", Usage(3, 0, 0))
    assert not decoder.events


def test_stop_texts_end_it_and_are_not_shown(tokenizer):
    pieces, last = script(tokenizer, "one two three", stop=["tw", "three"])
    assert ("".join(pieces), last.finish_reason) == ("one ", "stop")
    assert "".join(script(tokenizer, "one twin", stop=["two"])[0]) == "one twin"


def test_stop_ids_and_ignoring_the_end(tokenizer):
    [space] = tokenizer.encode(" ")
    pieces, last = script(tokenizer, "one two", stop_ids=frozenset({space}))
    assert ("".join(pieces), last.finish_reason, last.usage.completion_tokens) == ("one", "stop", 4)
    pieces, last = script(tokenizer, "one", ignore_eot=True, max_tokens=6)
    assert ("".join(pieces), last.finish_reason) == ("one", "length"), "control tokens are not shown"
    assert "".join(script(tokenizer, "one", ignore_eot=True, max_tokens=4, special=True)[0]) == "one<|endoftext|>"


def test_the_prompt_is_given_out_first_on_request(tokenizer):
    assert "".join(script(tokenizer, "é", prompt="雪 ", echo=True)[0]) == "雪 é"
    assert "".join(script(tokenizer, "é", prompt="雪 stop", echo=True, stop=["stop"])[0]) == "雪 stopé"


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("rewinds", [True, False])
def test_64_requests_side_by_side_each_give_the_text_that_they_give_alone(tokenizer, rewinds, blocks):
    random = np.random.default_rng(3)
    words = ["", "a", "abc " * 5, "snow 雪 " * 7, "the same beginning, ", "the same beginning, and more"]
    requests = [
        request(
            tokenizer,
            random.choice(words) + "x" * int(random.integers(1, 30)),
            int(random.integers(1, 40)),
            sampling=Sampling(float(random.choice([0, 0.7, 1.3])), int(random.choice([0, 20])), repetition_penalty=1.1, seed=number),
            stop=["e"] if number % 5 == 0 else [],
            logprobs=2 if number % 7 == 0 else None,
        )
        for number in range(64)
    ]
    engine, decoder = make(tokenizer, 6, chunk=16, keep_bytes=100_000, rewinds=rewinds, blocks=blocks)
    got = answers(engine, requests)
    assert decoder.count("rewind" if rewinds else "load"), "beginnings were used again"
    assert {event[2] for event in decoder.events if event[0] == "block"} == ({4, 16} if blocks else set())
    assert decoder.count("step"), "requests with log-probabilities go by step"
    for one, (text, last, ids) in zip(requests, got, strict=True):
        text_alone, last_alone, ids_alone = alone(tokenizer, one, chunk=16, reuse=False)
        assert (text, ids, last.finish_reason) == (text_alone, ids_alone, last_alone.finish_reason)
    assert engine.stats.finished.total() == 64
    assert not engine.busy


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("rewinds", [True, False])
def test_requests_that_come_and_go_at_any_time_end_once_with_the_text_that_they_give_alone(tokenizer, rewinds, blocks):
    random = np.random.default_rng(7)
    engine, _ = make(tokenizer, 3, chunk=4, keep_bytes=20_000, rewinds=rewinds, blocks=blocks, max_len=40)
    asked, texts, ends, tickets = [], [], [], []
    while len(asked) < 80 or engine.busy:
        if len(asked) < 80 and random.random() < 0.4:
            prompt = "the same beginning "[: int(random.integers(1, 20))] + "yz"[: int(random.integers(0, 3))]
            how = Sampling(float(random.choice([0, 1])), seed=int(random.integers(3)))
            stop = [["e"], ["th", "q"], []][int(random.integers(3))]
            asked.append(request(tokenizer, prompt, int(random.integers(0, 30)), sampling=how, stop=stop, echo=random.random() < 0.2))
            tickets.append(engine.submit(asked[-1]))
            texts.append("")
            ends.append([])
        if tickets and random.random() < 0.2:
            engine.cancel(random.choice(tickets[-5:]))
        for ticket, piece in engine.step():
            texts[tickets.index(ticket)] += piece.text
            ends[tickets.index(ticket)] += [piece.finish_reason] if piece.finish_reason else []
    assert all(len(each) == 1 for each in ends)
    assert {reason for [reason] in ends} == {"stop", "length", "cancelled"}
    for one, text, [reason] in zip(asked, texts, ends, strict=True):
        expected, last, _ = alone(tokenizer, one, reuse=False, chunk=4, max_len=40)
        if reason == "cancelled":
            assert expected.startswith(text), "what waited is not given out"
        else:
            assert (text, reason) == (expected, last.finish_reason)


def test_a_long_prompt_delays_the_others_by_one_chunk_a_step(tokenizer):
    engine, decoder = make(tokenizer, 2, chunk=8)
    short = engine.submit(request(tokenizer, "ab", 30, ignore_eot=True))
    engine.step()
    engine.submit(request(tokenizer, "x" * 64, 3))
    decoder.events.clear()
    for _ in range(8):
        engine.step()
    fed = [event for event in decoder.events if event[0] == "feed"]
    assert fed == [("feed", 1, 8)] * 8
    assert decoder.count("step") == 8, "the short one went on at each step"
    assert short.generated == 9


def test_requests_get_rows_in_the_order_in_which_they_came(tokenizer):
    engine, _ = make(tokenizer, 2)
    tickets = [engine.submit(request(tokenizer, "ab", 3 + number, ignore_eot=True)) for number in range(6)]
    ended = []
    while engine.busy:
        ended += [ticket for ticket, piece in engine.step() if piece.finish_reason]
    assert ended == tickets


def test_a_cancelled_request_frees_its_row_with_the_next_step_and_one_that_waits_never_gets_one(tokenizer):
    engine, _ = make(tokenizer, 1)
    first, second, third = (engine.submit(request(tokenizer, "ab", None, ignore_eot=True)) for _ in range(3))
    for _ in range(5):
        engine.step()
    engine.cancel(second)
    pieces = dict(engine.step())
    assert pieces[second].finish_reason == "cancelled"
    assert pieces[second].usage == Usage(2, 0, 0)
    assert first.reason is None, "the one that runs goes on"
    engine.cancel(first)
    pieces = dict(engine.step())
    assert (pieces[first].finish_reason, third.generated > 0) == ("cancelled", True)
    engine.cancel(third)
    engine.step()
    assert (engine.busy, engine.running, engine.waiting) == (False, 0, 0)
    assert engine.stats.finished == {"cancelled": 3}


def test_closing_a_run_cancels_what_is_left_of_it(tokenizer):
    engine, _ = make(tokenizer, 1)
    pieces = engine.run([request(tokenizer, "ab", None, ignore_eot=True)] * 2)
    next(pieces)
    pieces.close()
    assert not engine.busy


def test_a_request_that_fails_ends_alone(tokenizer):
    engine, decoder = make(tokenizer, 3)
    bad = tokenizer.encode("q")[0]
    decoder.broken = {bad}
    requests = [
        request(tokenizer, "abc", 9, sampling=Sampling(logit_bias=((bad, -100.0),))),
        request(tokenizer, "aq"),
        request(tokenizer, "é", 9, sampling=Sampling(logit_bias=((bad, -100.0),))),
    ]
    tickets = [engine.submit(one) for one in requests]
    lasts = {}
    while engine.busy:
        lasts |= {ticket: piece for ticket, piece in engine.step() if piece.finish_reason}
    assert lasts[tickets[1]].finish_reason == "error"
    assert "largest logit" in lasts[tickets[1]].error
    assert isinstance(tickets[1].error, NotFiniteError)
    for number in (0, 2):
        assert lasts[tickets[number]].finish_reason in ("length", "stop")


def test_what_the_decoder_raises_is_raised(tokenizer, monkeypatch):
    engine, decoder = make(tokenizer)
    engine.submit(request(tokenizer))
    monkeypatch.setattr(decoder, "feed", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.step()


def test_what_cannot_be_answered_is_refused_at_once(tokenizer):
    engine, _ = make(tokenizer)
    with pytest.raises(ConfigError, match="no token"):
        engine.submit(Request([]))
    assert not engine.busy


def test_a_talk_that_goes_on_is_fed_only_what_is_new(tokenizer):
    for rewinds in (True, False):
        engine, decoder = make(tokenizer, 2, keep_bytes=1000, rewinds=rewinds)
        first = engine.submit(request(tokenizer, "the question", 5, ignore_eot=True))
        while engine.busy:
            engine.step()
        decoder.events.clear()
        more = Request([*first.ids, *tokenizer.encode(" and another")], 5)
        [(text, last, _)] = answers(engine, [more])
        assert last.usage.cached_tokens == len(first.ids) - 1, "the last token was never fed"
        assert sum(event[2] for event in decoder.events if event[0] == "feed") == 1 + len(" and another")
        assert text == alone(tokenizer, more)[0]
        assert engine.stats.cached_tokens == last.usage.cached_tokens


def test_samples_of_one_prompt_share_its_computation(tokenizer):
    for rewinds in (True, False):
        engine, decoder = make(tokenizer, 4, keep_bytes=100_000, rewinds=rewinds)
        requests = [request(tokenizer, "a long prompt " * 9, 4, sampling=Sampling(seed=seed)) for seed in range(8)]
        got = answers(engine, requests)
        assert sum(event[2] for event in decoder.events if event[0] == "feed") <= 9 * 14 + (8 if rewinds else 0)
        assert [text for text, _, _ in got] == [alone(tokenizer, one)[0] for one in requests]


def test_what_is_kept_stays_within_its_bytes(tokenizer):
    engine, _ = make(tokenizer, 1, keep_bytes=350, rewinds=False)  # a state of the fake takes 100, and its logits 1048
    for text in ("one", "two", "three", "four", "five"):
        answers(engine, [request(tokenizer, text)])
    assert engine._prefixes.nbytes <= 350
    assert len(engine._prefixes) == 3


def test_a_window_that_slid_is_not_rewound(tokenizer):
    engine, decoder = make(tokenizer, 1, max_len=8)
    answers(engine, [request(tokenizer, "abcd", 12, ignore_eot=True)] * 2)
    assert not decoder.count("rewind")


def test_logprobs_are_of_the_models_own_distribution_with_the_most_probable_beside(tokenizer):
    engine, decoder = make(tokenizer)
    how = Sampling(temperature=0.3, top_k=5, repetition_penalty=2.0, seed=4)
    pieces = list(engine.run([request(tokenizer, "ab", 6, sampling=how, logprobs=3, ignore_eot=True, special=True)]))
    tokens = [token for _, piece in pieces for token in piece.tokens]
    ids = tokenizer.encode("ab")
    assert len(tokens) == 6
    for token in tokens:
        decoder.reset()
        expected = log_softmax(decoder.feed(ids)[: tokenizer.vocab_size])
        assert token.logprob == expected[token.id]
        best = np.argsort(-expected, kind="stable")[:3]
        assert token.top == tuple((int(i), float(expected[i])) for i in best)
        ids.append(token.id)
    assert b"".join(token.bytes for token in tokens).decode(errors="replace") == "".join(piece.text for _, piece in pieces)


def test_an_echoed_prompt_brings_its_own_logprobs(tokenizer):
    def score(ids, top):
        return [(None, ())] + [(-float(n), ((5, -0.5),) * top) for n in range(1, len(ids))]

    for count in (0, 2):
        engine, decoder = make(tokenizer, score=score)
        pieces = list(engine.run([request(tokenizer, "ab雪", count, echo=True, logprobs=1)]))
        tokens = [token for _, piece in pieces for token in piece.tokens]
        assert [token.logprob for token in tokens[:5]] == [None, -1, -2, -3, -4]
        assert tokens[1].top == ((5, -0.5),)
        assert len(tokens) <= 5 + count
        assert decoder.count("feed") == (count > 0)


def test_what_was_measured_adds_up(tokenizer):
    engine, _ = make(tokenizer, 2)
    got = answers(engine, [request(tokenizer, "abc", 5)] * 3)
    stats = engine.stats
    assert stats.generation_tokens == sum(last.usage.completion_tokens for _, last, _ in got)
    assert stats.prompt_tokens == 9
    assert stats.first_token_seconds.count == stats.request_seconds.count == stats.queue_seconds.count == 3
    assert stats.token_seconds.count == stats.generation_tokens - 3
    assert stats.request_seconds.cumulative()[-1] == (float("inf"), 3)


def test_tokens_that_a_device_drew_after_a_stop_text_are_not_wanted_and_its_state_is_known(tokenizer):
    engine, decoder = make(tokenizer, 1, blocks=True)
    text, _, ids = alone(tokenizer, request(tokenizer, "abc", 12, ignore_eot=True, special=True))
    stop = bytes(tokenizer.decode_bytes(ids[3:5])).decode(errors="replace")
    [(cut, last, _)] = answers(engine, [request(tokenizer, "abc", 12, ignore_eot=True, special=True, stop=[stop])])
    assert (cut, last.finish_reason) == (text[: text.find(stop)], "stop")
    assert len(engine._rows[0].ids) == decoder.position(0)
    more = Request([*engine._rows[0].ids, 1, 2], 5)
    assert answers(engine, [more])[0][0] == alone(tokenizer, more)[0]
    assert decoder.count("rewind") == 1


def test_blocks_are_short_while_a_prompt_is_fed(tokenizer):
    engine, decoder = make(tokenizer, 2, chunk=8, blocks=True)
    engine.submit(request(tokenizer, "ab", 60, ignore_eot=True))
    engine.step()
    engine.submit(request(tokenizer, "x" * 24, 1))
    while engine.busy:
        engine.step()
    lengths = [event[2] for event in decoder.events if event[0] == "block"]
    assert lengths[:2] == [4, 4], "two of three chunks: the last one fills it"
    assert lengths[2] == 16


def test_a_space_that_a_tokenizer_puts_before_a_text_is_not_given_out(tokenizer):
    import copy

    spaced = copy.copy(tokenizer)
    spaced.strips_first_space = True
    ids = tokenizer.encode(" one two")

    def text(prompt, **more):
        engine = Engine(FakeDecoder(tokenizer.vocab_size, 1, script=[*prompt, *ids, tokenizer.eot_id]), spaced)
        return "".join(piece.text for _, piece in engine.run([Request(prompt, 20, GREEDY, **more)]))

    assert text([tokenizer.eot_id]) == "one two", "it begins a document"
    assert text(tokenizer.encode("a")) == " one two"
    assert text(tokenizer.encode(" a"), echo=True) == "a one two"


def test_states_of_short_texts_are_not_worth_keeping(tokenizer, monkeypatch):
    monkeypatch.setattr("smedjan_common.inference.prefixes.SHORTEST", 32)
    engine, decoder = make(tokenizer, 1, keep_bytes=100_000, rewinds=False)
    answers(engine, [request(tokenizer, "abc", 5, ignore_eot=True)])
    assert not decoder.count("save")
    answers(engine, [request(tokenizer, "x" * 31, 1), request(tokenizer, "x" * 32, 1)])
    assert [event[2] for event in decoder.events if event[0] == "save"] == [32, 32], "after the prompt, and after the answer"


def test_warming_up_counts_as_nothing_and_changes_no_text(tokenizer):
    cold, (warm, decoder) = make(tokenizer, keep_bytes=1000)[0], make(tokenizer, keep_bytes=1000)
    warm.warm_up(7)
    assert decoder.count("feed") == 1
    assert (warm.stats, warm.busy) == (Stats(), False)
    asked = [request(tokenizer, logprobs=1)]
    assert answers(warm, asked) == answers(cold, asked)
