"""Encoding and decoding: equal to `tokenizers`, tiktoken and the definition; every text round-trips; nothing is quadratic."""

import dataclasses
import itertools
import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smedjan_common.errors import DataError
from smedjan_common.text.corpus import default_corpus
from smedjan_common.text.cuts import last_safe_cut, safe_cut
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.tokenizer.bpe import Merges
from smedjan_common.tokenizer.encoder import Encoder
from smedjan_common.tokenizer.fast_split import RULES, word_starts
from smedjan_common.tokenizer.patterns import PATTERNS, Splitter, ascii_twin
from smedjan_common.tokenizer.word_table import WordTable

HOSTILE = [
    "",
    " ",
    "\n",
    "\r\n\r\n  \t x",
    "it's 'S IT'LL we'Ve 'ſ x's\n's",
    "a" * 3000,
    "ab" * 1500,
    " " * 3000,
    "1234567890" * 20,
    '(((a) (b"c\'d"))) _x_ --- ...\n\n\n/path/to/file.py:12',
    "日本語のテキスト、中文文本。한국어 עברית العربية ไทย",
    "👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u00a0\u2003\u3000 \u200b \ufeff \x00\x01\x1c\x1d\x85",
    "<|endoftext|> <|endoftext|>",
    "\U0010ffff\ue000\u0378",
    "x\t\ty \t z\n \n  w",
]
RULES_BY_NAME = [name for name, pattern in PATTERNS.items() if pattern in RULES]
SPLIT_ALPHABETS = [
    "'sStTmMdDrReEvVlLxX' (\n",
    "ab1 \t\n\r.'",
    "abZ's\n\n\r\t.é日5_\u3000 \x85\u2028\x1c\x0b\x0c\x00'(",
    "'ſsſ Ks'LL're'Ve 12345a",
    "\u0300a\u0301.\u00a0 1\u0661\u0662\u0663\u0664\u2160x",
    " \n.\t",
    "".join(map(chr, range(128))) + "''sssttt   \n\n\n",
]
any_text = st.text(st.characters(codec="utf-8") | st.sampled_from(list(" \n\r\t'sStT1aé日\u00a0.(")), max_size=200)


def sample_texts() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in default_corpus().paths[:10]]


@pytest.fixture(scope="module", params=list(PATTERNS))
def tokenizer(request) -> Tokenizer:
    return Tokenizer.train_from_texts([*sample_texts(), *HOSTILE * 3], 3000, request.param)


@pytest.fixture(scope="module")
def default_tokenizer() -> Tokenizer:
    return Tokenizer.train_from_texts([*sample_texts(), *HOSTILE * 3], 3000)


@pytest.fixture(scope="module")
def hf(tokenizer):
    tokenizers = pytest.importorskip("tokenizers")
    oracle = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    oracle.encode_special_tokens = True
    return oracle


def tiktoken_of(tokenizer: Tokenizer):
    tiktoken = pytest.importorskip("tiktoken")
    return tiktoken.Encoding(
        "ours", pat_str=tokenizer.pattern, mergeable_ranks=tokenizer.vocabulary.tokens, special_tokens=tokenizer.special_tokens
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_encode_as_tokenizers_and_tiktoken_do(tokenizer, hf, text):
    ids = tokenizer.encode(text)
    assert ids == hf.encode(text).ids
    assert ids == tiktoken_of(tokenizer).encode_ordinary(text)
    assert tokenizer.decode(ids) == text


def test_real_text_encodes_as_tokenizers_and_tiktoken_do(tokenizer, hf):
    text = "\n".join(sample_texts())
    ids = tokenizer.encode(text)
    assert ids == tiktoken_of(tokenizer).encode_ordinary(text)
    assert tokenizer.encode(text[:100_000]) == hf.encode(text[:100_000]).ids


@given(text=any_text)
@settings(max_examples=300, deadline=None)
def test_any_text_encodes_as_tiktoken_does_and_round_trips(default_tokenizer, text):
    ids = default_tokenizer.encode(text)
    assert ids == tiktoken_of(default_tokenizer).encode_ordinary(text)
    assert default_tokenizer.decode_bytes(ids) == text.encode()


@given(words=st.lists(st.text(st.sampled_from("abcdefg é日 "), min_size=1, max_size=64).map(lambda text: text.encode()[:64]), max_size=80))
@settings(max_examples=60, deadline=None)
def test_the_four_ways_to_encode_a_word_agree(default_tokenizer, words):
    merges = default_tokenizer._merges
    expected = [merges.encode_plain(word) for word in words]
    assert [merges.encode_long(word) for word in words] == expected
    assert merges.in_order
    assert [merges.encode_longest(word) for word in words] == expected
    packed = np.frombuffer(b"".join(words), np.uint8), np.array(list(map(len, words)), np.int64)
    flat, lengths = merges.encode_many(*packed)
    assert lengths.tolist() == [len(word) for word in expected]
    assert flat.tolist() == [symbol for word in expected for symbol in word]
    ids, lengths = merges.encode_packed(*packed)
    assert ids.tolist() == merges.ids[flat].tolist()


def merges_of(pairs: list[tuple[bytes, bytes]]) -> Merges:
    """Merges of pairs of tokens, each the result of some other pair or one byte; equal results are one symbol."""
    tokens = [bytes([byte]) for byte in range(256)] + list(dict.fromkeys(left + right for left, right in pairs))
    symbol = {token: number for number, token in reversed(list(enumerate(tokens)))}
    numbers = [(symbol[left], symbol[right]) for left, right in pairs]
    return Merges(numbers, [symbol[left + right] for left, right in pairs], np.arange(len(tokens), dtype=np.int32))


@st.composite
def pairs_of_tokens(draw):
    tokens, pairs = [b"a", b"b"], []
    for _ in range(draw(st.integers(1, 12))):
        pairs.append((draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))))
        tokens.append(b"".join(pairs[-1]))
    return draw(st.permutations(pairs)) if draw(st.booleans()) else pairs


@given(pairs_of_tokens(), st.text("ab", max_size=12), st.text("ab", min_size=1, max_size=40))
@settings(max_examples=300, deadline=None)
def test_long_words_are_encoded_by_the_definition_whatever_the_merges_and_their_order(pairs, start, again):
    merges, word = merges_of(pairs), (start + again * (300 // len(again) + 1)).encode()
    expected = merges.encode_plain(word)
    assert merges.encode_long(word) == merges.encode_word(word) == expected
    if merges.in_order:
        assert merges.encode_longest(word) == expected


def test_merges_out_of_order_are_not_merged_rank_by_rank():
    merges, word = merges_of([(b"ab", b"a"), (b"a", b"b")]), b"ab" * 200
    assert not merges.in_order
    assert merges.encode_longest(word) != merges.encode_plain(word) == merges.encode_word(word)


def test_random_bytes_round_trip_through_decode_bytes(default_tokenizer):
    draw = random.Random(0)
    data = draw.randbytes(20000)
    symbols = default_tokenizer._merges.encode_long(data)
    assert default_tokenizer._merges.encode_longest(data) == symbols
    assert default_tokenizer.decode_bytes(default_tokenizer._merges.ids[symbols]) == data


def test_a_small_cache_gives_the_same_ids(default_tokenizer):
    text = "\n".join(sample_texts())
    small = Encoder(default_tokenizer._merges, Splitter(default_tokenizer.pattern), cache_words=100)
    assert np.array_equal(small.encode(text), default_tokenizer.encode_array(text))
    assert np.array_equal(small.encode(text), default_tokenizer.encode_array(text))


@pytest.mark.parametrize("text", ["x" * (1 << 20), "xy" * (1 << 18), " " * (1 << 18), "\n" * (1 << 18), "é" * (1 << 18)])
def test_long_words_are_no_attack(default_tokenizer, text):
    started = time.perf_counter()
    ids = default_tokenizer.encode(text)
    assert time.perf_counter() - started < 30  # a quadratic way takes hours
    assert default_tokenizer.decode(ids) == text


def test_words_of_every_length_and_a_vocabulary_taken_whole(default_tokenizer):
    words = [b"ab" * n for n in range(1, 60)] + [b"the", b" hammer"] * 3
    packed = np.frombuffer(b"".join(words), np.uint8), np.array(list(map(len, words)), np.int64)
    expected = [int(i) for word in words for i in default_tokenizer._merges.ids[default_tokenizer._merges.encode_word(word)]]
    assert default_tokenizer._merges.encode_packed(*packed)[0].tolist() == expected
    whole = Tokenizer(dataclasses.replace(default_tokenizer.vocabulary, ignore_merges=True))
    assert whole._merges.encode_packed(*packed)[0].tolist() == expected


@pytest.mark.parametrize("name", RULES_BY_NAME)
def test_array_splitting_splits_as_the_pattern_does(name):
    splitter, rules = Splitter(PATTERNS[name]), RULES[PATTERNS[name]]
    draw = random.Random(3)
    for _ in range(6000):
        text = "".join(draw.choices(draw.choice(SPLIT_ALPHABETS), k=draw.randrange(1, 25)))
        assert split_by_arrays(text, rules) == splitter.words(text), repr(text)


@given(text=any_text)
@settings(max_examples=200, deadline=None)
def test_array_splitting_splits_any_text_as_the_pattern_does(text):
    for pattern in PATTERNS.values():
        assert split_by_arrays(text, RULES[pattern]) == Splitter(pattern).words(text)


def split_by_arrays(text, rules):
    data = text.encode()
    starts = word_starts(text, data, rules).tolist()
    return [data[start:end].decode() for start, end in itertools.pairwise([*starts, len(data)])] if text else []


def test_every_code_point_has_the_class_that_regex_gives_it():
    import regex

    from smedjan_common.tokenizer.fast_split import _classes

    for plane in range(0, 0x110000, 0x10000):
        codes = np.array([code for code in range(plane, plane + 0x10000) if not 0xD800 <= code < 0xE000], np.uint32)
        text = "".join(map(chr, codes))
        for expression, bits in ((r"\p{L}", 1), (r"\p{N}", 2), (r"\s", 4 | 8 | 16), (r"[\r\n]", 16), (r"[^\s\p{L}\p{N}]", 32)):
            inside = np.zeros(len(codes), bool)
            inside[[match.start() for match in regex.finditer(expression, text)]] = True
            assert np.array_equal((_classes(codes) & bits) != 0, inside), expression


def test_the_word_table_gives_each_word_one_slot():
    draw = random.Random(4)
    known: dict[bytes, int] = {}
    table = WordTable()
    for _ in range(30):
        words = [bytes(draw.choices(b"ab\0\1", k=draw.choice([1, 2, 3, 7, 8, 9, 15, 16, 17, 40, 65]))) for _ in range(3000)]
        data, lengths = b"".join(words), np.array(list(map(len, words)))
        slots, fresh = table.slots(data, np.cumsum(lengths) - lengths, 64)
        assert sorted(slots[fresh].tolist()) == slots[fresh].tolist()
        for word, slot in zip(words, slots.tolist(), strict=True):
            if len(word) <= 64:
                assert known.setdefault(word, slot) == slot
    assert len(set(known.values())) == len(known)


@given(text=any_text)
@settings(max_examples=100, deadline=None)
def test_both_ways_of_the_encoder_agree(default_tokenizer, text):
    ways = [Encoder(default_tokenizer._merges, Splitter(default_tokenizer.pattern), short_text=limit) for limit in (0, 1 << 30)]
    assert ways[0].encode(text).tolist() == ways[1].encode(text).tolist()


def test_lone_surrogates_become_replacement_characters(default_tokenizer):
    assert default_tokenizer.decode(default_tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert default_tokenizer.decode(default_tokenizer.encode("\ud83d\ude42")) == "🙂"
    assert default_tokenizer.decode(default_tokenizer.encode("fine")) == "fine"


def test_special_tokens_are_text_unless_allowed(default_tokenizer):
    text, special = "a<|endoftext|>b", default_tokenizer.eot_id
    assert special not in default_tokenizer.encode(text)
    for allowed in ("all", {"<|endoftext|>"}, ["<|endoftext|>", "unknown"]):
        assert default_tokenizer.encode(text, allowed) == [*default_tokenizer.encode("a"), special, *default_tokenizer.encode("b")]
    assert default_tokenizer.decode([special]) == "<|endoftext|>"
    assert default_tokenizer.token_bytes()[special] == 0


def test_token_bytes_add_up_to_the_text(default_tokenizer):
    text = "".join(HOSTILE)
    ids = default_tokenizer.encode(text)
    sizes = default_tokenizer.token_bytes()
    assert sizes.dtype == np.int32
    assert len(sizes) == default_tokenizer.vocab_size
    assert sizes[ids].sum() == len(text.encode())


@given(ids=st.lists(st.integers(-5, 4000) | st.integers(-(1 << 40), 1 << 40), max_size=50))
@settings(max_examples=100, deadline=None)
def test_decode_never_raises(default_tokenizer, ids):
    assert isinstance(default_tokenizer.decode(ids), str)
    stream = default_tokenizer.stream()
    assert "".join([*map(stream.push, ids), stream.finish()]) == default_tokenizer.decode(ids)


def test_streams_hold_back_partial_characters(default_tokenizer):
    ids = default_tokenizer.encode("é日🙂")
    stream = default_tokenizer.stream()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) == "é日🙂"
    assert "\ufffd" not in "".join(pieces)
    stream = default_tokenizer.stream()
    assert stream.push(default_tokenizer.vocabulary.tokens[b"\xe6"]) == ""
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("workers", [None, 1, 2])
def test_a_batch_is_its_texts(default_tokenizer, workers):
    texts = ["", "", *HOSTILE, "x\ud800", *sample_texts(), "", " \n", "\n", "12", "34", "'", "s"]
    assert default_tokenizer.encode_batch(texts, workers) == [default_tokenizer.encode(text) for text in texts]
    assert default_tokenizer.encode_batch([], workers) == []


@given(texts=st.lists(any_text, max_size=12))
@settings(max_examples=150, deadline=None)
def test_texts_encoded_together_do_not_see_each_other(default_tokenizer, texts):
    ids, counts = default_tokenizer.encode_many(texts)
    expected = [default_tokenizer.encode(text) for text in texts]
    assert counts.tolist() == [len(part) for part in expected]
    assert ids.tolist() == [i for part in expected for i in part]


@pytest.mark.parametrize("name", PATTERNS)
def test_the_ascii_twin_splits_as_the_pattern_does(name):
    import regex

    twin, full = Splitter(PATTERNS[name]), regex.compile(PATTERNS[name])
    assert ascii_twin(PATTERNS[name])
    draw = random.Random(1)
    letters = "aZsStTlLdm'  \n\r\t\x0b\x0c\x1c\x00.(_5" + "".join(map(chr, range(128)))
    for _ in range(3000):
        text = "".join(draw.choices(letters, k=draw.randrange(30)))
        assert twin.words(text) == full.findall(text), repr(text)


@pytest.mark.parametrize("name", PATTERNS)
def test_safe_cuts_do_not_change_words(name):
    splitter = Splitter(PATTERNS[name])
    draw = random.Random(2)
    for _ in range(3000):
        text = "".join(draw.choices("ab Z's\n\n\r\t.é日5_\u3000 ", k=40))
        for cut in {safe_cut(text, draw.randrange(40)), last_safe_cut(text, 7), last_safe_cut(text)} - {None}:
            assert splitter.words(text[:cut]) + splitter.words(text[cut:]) == splitter.words(text), repr((text, cut))


def test_blocks_have_the_words_of_the_whole():
    splitter, text = Splitter(PATTERNS["cl100k"]), "\n".join(sample_texts())
    blocks = list(splitter.blocks(text, 5000))
    assert "".join(blocks) == text
    assert len(blocks) > 10
    assert [word for block in blocks for word in splitter.words(block)] == splitter.words(text)


def test_ones_own_pattern_keeps_what_it_does_not_match():
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = Tokenizer.train_from_texts(["a1b2 c3, d4"] * 5, 300, r"[a-z]+(\d)?")
    text = "--a1??b2 zz é9"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text) == tokenizers.Tokenizer.from_str(tokenizer.to_json()).encode(text).ids


def test_no_end_of_text_token_is_said():
    with pytest.raises(DataError, match="no end-of-text"):
        _ = Tokenizer.train_from_texts(["abc"], 300, special_tokens=()).eot_id
