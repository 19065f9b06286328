"""Generation over a decoder: where it ends, what it streams, what it feeds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smedjan_common.inference.generate import Generation, cut_at_stop
from smedjan_common.inference.sampling import Sampling
from smedjan_common.tokenizer import Tokenizer

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train_from_texts(["naïve café — ein Märchen, 雪 and snow"] * 5, vocab_size=257)  # bytes and the end only


class Script:
    """A decoder that wants to write the given ids; records what it was fed."""

    def __init__(self, ids, vocab_size, prompt_length):
        self.ids, self.vocab_size, self.at, self.fed = ids, vocab_size, -prompt_length, []

    def feed(self, ids):
        self.fed.append(list(ids))
        self.at += len(ids)
        logits = np.zeros(self.vocab_size + 31, np.float32)
        logits[self.vocab_size :] = 99  # rows that pad the embedding are no tokens
        logits[self.ids[self.at]] = 9
        return logits


def generation(tokenizer, text, prompt="a", max_tokens=100, context=1000, stop=(), end=True):
    ids = tokenizer.encode(text) + ([tokenizer.eot_id] if end else [])
    prompt_ids = tokenizer.encode(prompt)
    return Generation(Script(ids, tokenizer.vocab_size, len(prompt_ids)), tokenizer, prompt_ids, max_tokens, context, GREEDY, stop)


def test_it_stops_at_the_end_of_text_and_feeds_each_token_once(tokenizer):
    made = generation(tokenizer, "naïve 雪!", prompt="abc")
    assert "".join(made) == "naïve 雪!"
    assert made.reason == "end of text"
    assert [token for chunk in made.decoder.fed for token in chunk] == tokenizer.encode("abcnaïve 雪!")
    assert len(made.decoder.fed[0]) == 3, "the prompt is fed at once"


def test_pieces_are_whole_characters(tokenizer):
    pieces = list(generation(tokenizer, "a雪é"))
    assert pieces == ["a", "雪", "é"]


def test_max_tokens_and_a_character_cut_short(tokenizer):
    made = generation(tokenizer, "a雪", max_tokens=2)
    assert "".join(made) == "a\ufffd"
    assert (made.reason, made.num_tokens) == ("length", 2)


def test_the_context_length_ends_it_and_is_told(tokenizer):
    made = generation(tokenizer, "abcdefgh", prompt="xyz", context=5)
    assert "".join(made) == "ab"
    assert made.reason == "context"


def test_nothing_of_a_stop_text_is_given_out(tokenizer):
    made = generation(tokenizer, "one two three", stop=("tw", "three"))
    assert list(made) == ["o", "n", "e", " "]
    assert made.reason == "stop"


def test_what_only_began_like_a_stop_text_is_given_out(tokenizer):
    assert "".join(generation(tokenizer, "one twin", stop=("two",))) == "one twin"
    assert "".join(generation(tokenizer, "one tw", stop=("two",))) == "one tw"


@given(st.lists(st.text("ab", max_size=3), max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_texts_over_any_pieces_equal_a_search_in_the_whole(pieces, stops):
    given_out, held, stopped = "", "", False
    for piece in pieces:
        text, held, stopped = cut_at_stop(held + piece, stops)
        given_out += text
        if stopped:
            break
    whole = "".join(pieces)
    # the first stop text to be complete ends it; of those complete at the same character the longest
    ends = [(whole.find(stop) + len(stop), -len(stop)) for stop in stops if stop in whole]
    if not ends:
        assert given_out + held == whole
    else:
        assert stopped
        assert not any(stop in given_out for stop in stops)
        assert whole.startswith(given_out)
