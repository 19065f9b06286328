"""Speculative decoding without a framework: a draft changes no text, whatever it guesses; what it gains is counted; and its rule."""

import os

import numpy as np
import pytest

from smedjan_common.inference.engine import Engine
from smedjan_common.inference.request import Request
from smedjan_common.inference.sampling import Sampling, filtered, penalize, probabilities, sample
from smedjan_common.inference.speculation import Speculator, accepted
from smedjan_common.tokenizer import Tokenizer
from tests.fakes.rows import FakeDecoder

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_from_texts(["naïve café — ein Märchen, 雪 and snow"] * 5, vocab_size=257)


class Draft(FakeDecoder):
    """Mostly of the other decoder's opinion. own_size: tokens that it knows."""

    def __init__(self, vocab_size, rows=1, wrong=3, own_size=None, **more):
        super().__init__(vocab_size, rows, **more)
        self.wrong, self.own_size = wrong, own_size or vocab_size

    def _consume(self, row, token):
        assert token < self.own_size, "it does not know the token"
        super()._consume(row, token)

    def _logits(self, row, last):
        logits = super()._logits(row, last)
        if self.wrong and self.states[row][-1] % self.wrong == 0:
            logits[: self.vocab_size] = logits[: self.vocab_size][::-1].copy()
        return logits


def requests(tokenizer, count=24):
    random, made = np.random.default_rng(5), []
    for number in range(count):
        prompt = tokenizer.encode("a naïve café")[: int(random.integers(1, 12))]
        kinds = {"temperature": float(random.choice([0, 0.8])), "top_k": int(random.choice([0, 30])), "top_p": 0.9, "min_p": 0.01}
        penalties = {"repetition_penalty": 1.2, "presence_penalty": 0.1 * (number % 3), "logit_bias": ((3, 2.0), (250, -5.0))}
        sampling = Sampling(**kinds, **penalties if number % 2 else {}, seed=number)
        stop = ["e"] if number % 5 == 0 else []
        made.append(Request(prompt, int(random.integers(1, 30)), sampling, stop, logprobs=1 if number % 4 == 0 else None))
    return made


def answers(engine, asked):
    """(text, tokens, how many of them, ids, why it ended) of each; what is cached depends on when rows become free."""
    tickets, pieces = [engine.submit(one) for one in asked], [[] for _ in asked]
    for number, piece in engine.answer(tickets):
        pieces[number].append(piece)
    found = []
    for its, ticket in zip(pieces, tickets, strict=True):
        tokens, usage = [token for piece in its for token in piece.tokens], its[-1].usage
        text = "".join(piece.text for piece in its)
        found.append((text, tokens, (usage.prompt_tokens, usage.completion_tokens), ticket.ids, ticket.reason))
    return found


def made(tokenizer, rows, ahead, *, rewinds=True, recalls=True, max_len=1 << 30, reuse=True, blocks=False, **draft):
    size = tokenizer.vocab_size
    decoder, small = FakeDecoder(size, rows, max_len, rewinds), Draft(size, rows, rewinds=recalls, **draft)
    speculator = Speculator(small, ahead, size, small.own_size, unknown=0, blocks=blocks) if ahead else None
    return Engine(decoder, tokenizer, reuse=reuse, keep_bytes=10_000, speculator=speculator), decoder, small


@pytest.mark.parametrize(("rows", "ahead"), [(3, 1), (1, 4), (4, 4), (3, 7)])
@pytest.mark.parametrize("rewinds", [True, False], ids=["rewinds", "sums-up"])
@pytest.mark.parametrize("draft", [{}, {"recalls": False}, {"blocks": True}, {"recalls": False, "blocks": True}], ids=str)
def test_a_draft_changes_no_text_no_usage_and_no_logprob(tokenizer, rows, ahead, rewinds, draft):
    asked = requests(tokenizer, 12)
    plain, spec = made(tokenizer, rows, 0, rewinds=rewinds), made(tokenizer, rows, ahead, rewinds=rewinds, **draft)
    assert answers(spec[0], asked) == answers(plain[0], asked)
    stats = spec[0].stats
    assert 0 < stats.accepted_tokens < stats.drafted_tokens
    assert stats.generation_tokens == plain[0].stats.generation_tokens
    if ahead == 4:
        assert spec[1].count("look") + spec[1].count("step") < 0.7 * plain[1].count("step")


@pytest.mark.parametrize("rewinds", [True, False], ids=["rewinds", "sums-up"])
def test_a_draft_that_is_always_right_gives_one_token_more_than_it_guesses(tokenizer, rewinds):
    engine, decoder, _ = made(tokenizer, 1, 3, rewinds=rewinds, wrong=0)
    answers(engine, [Request(tokenizer.encode("ab"), 41, Sampling(seed=3), ignore_eot=True)])
    assert engine.stats.accepted_tokens == engine.stats.drafted_tokens == 30
    assert decoder.count("look") == 10, "41 tokens: one of the prompt, then four each time"


def test_past_what_a_state_holds_texts_go_on_without_the_draft(tokenizer):
    asked = [Request(tokenizer.encode("abc"), 60, Sampling(seed=seed), ignore_eot=True) for seed in range(3)]
    plain = answers(made(tokenizer, 2, 0, max_len=20)[0], asked)
    engine, decoder, _ = made(tokenizer, 2, 4, max_len=20)
    assert answers(engine, asked) == plain
    assert decoder.count("look")
    for hybrid in (False, True):  # what sums up, beside what is overwritten: looks that were not kept are read again
        engine, decoder, _ = made(tokenizer, 2, 4, max_len=20, rewinds=not hybrid)
        assert answers(engine, asked) == plain
    engine, decoder, small = made(tokenizer, 2, 4, max_len=10)
    small.max_len, small.endless = 10, False
    assert answers(engine, asked) == plain
    assert max(map(small.position, range(2))) <= 10


def test_a_draft_may_know_fewer_tokens_or_more(tokenizer):
    asked = requests(tokenizer)
    plain = answers(made(tokenizer, 2, 0)[0], asked)
    engine, _, small = made(tokenizer, 2, 4, own_size=200)
    assert answers(engine, asked) == plain
    assert engine.stats.accepted_tokens
    small = FakeDecoder(tokenizer.vocab_size + 2, 2)
    engine = Engine(
        FakeDecoder(tokenizer.vocab_size, 2), tokenizer, speculator=Speculator(small, 4, tokenizer.vocab_size, small.vocab_size, 0)
    )
    assert answers(engine, asked) == plain


def test_a_talk_goes_on_in_the_draft_too(tokenizer):
    for rewinds in (True, False):
        engine, _, small = made(tokenizer, 1, 4, recalls=rewinds)
        first = tokenizer.encode("a long beginning of a talk")
        text = answers(engine, [Request(first, 12, GREEDY, ignore_eot=True)])[0][3]
        fed = sum(event[2] for event in small.events if event[0] == "feed")
        answers(engine, [Request([*text, *tokenizer.encode(" and")], 12, GREEDY, ignore_eot=True)])
        again = sum(event[2] for event in small.events if event[0] == "feed") - fed
        assert again < len(text)


def test_logits_of_a_draft_that_are_no_numbers_end_its_guess_only(tokenizer):
    asked = requests(tokenizer, 6)
    engine, _, small = made(tokenizer, 2, 4)
    small.broken = set(range(0, 257, 2))
    assert answers(engine, asked) == answers(made(tokenizer, 2, 0)[0], asked)


def test_a_request_that_fails_while_its_guesses_are_read_ends_alone(tokenizer):
    asked = requests(tokenizer, 6)
    plain, spec = made(tokenizer, 3, 0), made(tokenizer, 3, 4)
    for _, decoder, *_ in (plain, spec):
        decoder.broken = set(range(0, 257, 17))
    want, got = answers(plain[0], asked), answers(spec[0], asked)
    assert got == want
    assert {"error"} < {reason for *_, reason in got}


# the rule


V = 6
SAMPLINGS = {
    "temperature": Sampling(temperature=0.7),
    "top-k": Sampling(top_k=3),
    "top-p": Sampling(top_p=0.8),
    "min-p": Sampling(min_p=0.2),
    "repetition": Sampling(temperature=1.3, repetition_penalty=1.5),
}
TRIES = 20_000 if os.environ.get("SMEDJAN_TEST_FULL") == "1" else 4_000


def distribution(logits, sampling, history):
    scores = penalize(logits, history, sampling.repetition_penalty) / sampling.temperature
    return probabilities(filtered(scores, sampling))


def drawn(target, draft, sampling, ahead, seed, draft_seed):
    """What one look gives, with models whose logits depend on the last token: (tokens, how many guesses were right)."""
    history = [0, 1]
    guessed = []
    for _ in range(ahead):
        text = [*history, *guessed]
        guessed.append(sample(draft[text[-1]], text, sampling_of(sampling, draft_seed), len(text)))
    text, taken = list(history), []

    def draw(logits):
        taken.append(sample(logits, text, sampling_of(sampling, seed), len(text)))
        text.append(taken[-1])
        return taken[-1]

    return taken, accepted(draw, [target[token] for token in [history[-1], *guessed]], guessed)


def sampling_of(sampling, seed):
    return Sampling(**{**vars(sampling), "seed": seed})


@pytest.mark.parametrize("name", SAMPLINGS)
def test_tokens_after_a_guess_have_the_models_own_distribution_and_the_guess_is_right_as_often_as_told(name):
    """Total variation of many draws of two tokens from the exact probabilities; the draft's own tokens are far from them."""
    sampling, random = SAMPLINGS[name], np.random.default_rng(1)
    target = random.normal(size=(V, V)) * 1.2
    draft = target + random.normal(size=(V, V)) * 0.8
    exact, guess = np.zeros((V, V)), np.zeros((V, V))
    for model, into in ((target, exact), (draft, guess)):
        first = distribution(model[1], sampling, [0, 1])
        for token in range(V):
            into[token] = first[token] * distribution(model[token], sampling, [0, 1, token])
    counts, right = np.zeros((V, V)), 0
    for seed in range(TRIES):
        tokens, agreed = drawn(target, draft, sampling, 1, seed, seed)
        right += agreed
        if not agreed:  # as the next look goes on
            tokens.append(sample(target[tokens[0]], [0, 1, tokens[0]], sampling_of(sampling, seed), 3))
        counts[tuple(tokens)] += 1
    distance = np.abs(counts / TRIES - exact).sum() / 2
    expected = np.sqrt(2 * exact * (1 - exact) / (np.pi * TRIES)).sum() / 2  # of draws from exactly these probabilities
    assert distance < 1.3 * expected < 0.05
    assert np.abs(counts / TRIES - guess).sum() / 2 > 0.1
    p, q = distribution(target[1], sampling, [0, 1]), distribution(draft[1], sampling, [0, 1])
    agree = sum(1 / sum(max(p[j] / p[i], q[j] / q[i]) for j in range(V)) for i in range(V) if p[i] and q[i])
    apart = np.abs(p - q).sum() / 2
    assert right / TRIES == pytest.approx(agree, abs=2 / TRIES**0.5)
    assert (1 - apart) / (1 + apart) <= agree + 1e-9 <= 1 - apart + 2e-9


def test_a_rule_that_takes_every_guess_is_seen():
    """The check above can fail: the draft's own tokens are not the model's."""
    sampling, random = SAMPLINGS["temperature"], np.random.default_rng(1)
    target = random.normal(size=(V, V)) * 1.2
    draft = target + random.normal(size=(V, V)) * 0.8
    counts = np.bincount([sample(draft[1], [0, 1], sampling_of(sampling, seed), 2) for seed in range(5000)], minlength=V)
    assert np.abs(counts / 5000 - distribution(target[1], sampling, [0, 1])).sum() / 2 > 0.05
