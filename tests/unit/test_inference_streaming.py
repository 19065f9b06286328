"""The text of an answer as its tokens come: whole characters, no part of a stop text, each token with the text that it completes."""

from hypothesis import given
from hypothesis import strategies as st

from smedjan_common.inference.request import TokenInfo
from smedjan_common.inference.streaming import TextStream, cut_at_stop


def told(parts, stop=()):
    """(the pieces of text, the tokens beside each) of tokens that are these bytes."""
    stream, pieces = TextStream(stop), []
    for number, part in enumerate(parts):
        stream.push(TokenInfo(number, part))
        if (piece := stream.take())[0]:
            pieces.append(piece)
        if stream.stopped:
            break
    stream.finish()
    pieces.append(stream.take(last=True))
    return [(text, [token.id for token in tokens]) for text, tokens in pieces if text or tokens]


def test_a_character_is_given_out_when_its_last_byte_is_there_with_all_its_tokens():
    assert told([b"a", b"\xe9", b"\x9b", b"\xaab", b"c"]) == [("a", [0]), ("雪b", [1, 2, 3]), ("c", [4])]
    assert told([b"a\xe9", b"\x9b\xaa"]) == [("a", []), ("雪", [0, 1])], "a token that ends within a character waits for it"


def test_a_character_that_was_cut_off_is_told_as_such():
    assert told([b"a", b"\xf0\x9f"]) == [("a", [0]), ("\ufffd", [1])]


def test_nothing_of_a_stop_text_is_given_out_nor_its_tokens():
    assert told([b"one", b" t", b"w", b"o", b" three"], [" two"]) == [("one", [0])]
    assert told([b"one t", b"wo", b"x"], [" two"]) == [("one", []), ("", [0])], (
        "a token within which the stop text begins is part of the text"
    )
    assert told([b"\nUs", b"er:"], ["\nUser:"]) == []


def test_what_only_began_like_a_stop_text_is_given_out_with_its_tokens():
    assert told([b"a", b"b", b"a", b"c"], ["abb"]) == [("ab", [0, 1]), ("ac", [2, 3])]
    assert told([b"a", b"b"], ["abc"]) == [("ab", [0, 1])]


def test_tokens_without_text_come_with_the_next_that_has_some():
    assert told([b"", b"a", b""]) == [("a", [0, 1]), ("", [2])]


def test_a_stop_text_in_the_prompt_ends_nothing():
    stream = TextStream(["a"])
    stream.push(TokenInfo(0, b"banana"), given=True)
    assert stream.take()[0] == "banana"
    assert not stream.stopped


@given(
    st.text(alphabet="ab€雪😀", max_size=12),
    st.lists(st.integers(1, 4), max_size=30),
    st.lists(st.text("ab€", min_size=1, max_size=3), max_size=2),
)
def test_any_cut_of_the_bytes_gives_the_same_text_and_each_token_at_most_once(text, sizes, stops):
    raw, parts = text.encode(), []
    for size in [*sizes, len(raw)]:
        parts, raw = [*parts, raw[:size]], raw[size:]
    pieces = told([part for part in parts if part], stops)
    given_out, tokens = "".join(piece for piece, _ in pieces), [token for _, each in pieces for token in each]
    if not any(stop in text for stop in stops):
        assert given_out == text
        assert tokens == list(range(len(tokens)))
        assert len(tokens) == len([part for part in parts if part])
    else:
        assert text.startswith(given_out)
        assert not any(stop in given_out for stop in stops)
        assert tokens == sorted(set(tokens))


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
