"""Learning merges: equal to `tokenizers`' ByteLevel BPE merge for merge, and to the definition."""

import itertools
import json
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smedjan_common.errors import DataError
from smedjan_common.text.corpus import default_corpus
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.tokenizer.bytelevel import BYTE_ORDERS, to_chars
from smedjan_common.tokenizer.merge import _ahead, learn_merges
from smedjan_common.tokenizer.patterns import PATTERNS, Splitter
from smedjan_common.tokenizer.training import train
from smedjan_common.tokenizer.words import WordCounter, add, count_plain, count_texts, pack, unpack


def learn_plain(words: dict[bytes, int], byte_order: list[int], num_merges: int, min_count: int) -> list[tuple[int, int]]:
    """The definition: count all pairs anew before each merge."""
    rank = {byte: number for number, byte in enumerate(byte_order)}
    parts = [([rank[byte] for byte in word], count) for word, count in words.items()]
    merges = []
    while len(merges) < num_merges:
        pairs: Counter = Counter()
        for word, count in parts:
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair), default=None)
        if best is None or pairs[best] < min_count:
            break
        for word, _ in parts:
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == best:
                    word[at : at + 2] = [256 + len(merges)]
                at += 1
        merges.append(best)
    return merges


def learn_hf(texts: list[str], vocab_size: int, pattern: str, min_count: int) -> list[list[str]]:
    """The merges that `tokenizers` learns."""
    tokenizers = pytest.importorskip("tokenizers")
    pre = tokenizers.pre_tokenizers
    oracle = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    oracle.pre_tokenizer = pre.Sequence([pre.Split(tokenizers.Regex(pattern), "isolated"), byte_level])
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre.ByteLevel.alphabet(), min_frequency=min_count, show_progress=False
    )
    oracle.train_from_iterator(texts, trainer)
    return json.loads(oracle.to_str())["model"]["merges"]


def merges_of(tokenizer: Tokenizer) -> list[list[str]]:
    return [[to_chars(left), to_chars(right)] for left, right in tokenizer.vocabulary.merges]


@pytest.fixture(scope="module")
def code() -> list[str]:
    """A megabyte of the default corpus."""
    texts, size = [], 0
    for path in default_corpus().paths:
        texts.append(path.read_text(encoding="utf-8"))
        size += len(texts[-1])
        if size > 1 << 20:
            break
    return texts


def mixed_text(seed: int, length: int) -> str:
    """Random words of several scripts with long runs, so that ties and overlaps are many."""
    draw = random.Random(seed)
    alphabets = ["ab", "aA 'st\n", "éüßñ ", "日本語中文 ", "🙂👍🏽 ", "0123456789. ", "\t\r\n \u00a0\u3000x", "aaaa", "हिन्दी "]
    return "".join(draw.choice(alphabets[draw.randrange(len(alphabets))]) for _ in range(length))


small_words = st.dictionaries(st.text("abc", min_size=1, max_size=12).map(str.encode), st.integers(1, 9), max_size=12)


@given(words=small_words, order=st.sampled_from(["gpt2", "raw"]), min_count=st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_merges_equal_the_definition(words, order, min_count):
    expected = learn_plain(words, BYTE_ORDERS[order], 60, min_count)
    assert learn_merges(pack(words), BYTE_ORDERS[order], 60, min_count) == expected


@pytest.mark.parametrize("seed", range(6))
def test_merges_equal_the_definition_where_ties_are_many(seed):
    words = dict(Counter(mixed_text(seed, 3000).encode().split(b" ")))
    words.pop(b"", None)
    assert learn_merges(pack(words), BYTE_ORDERS["gpt2"], 400, 1) == learn_plain(words, BYTE_ORDERS["gpt2"], 400, 1)


@pytest.mark.parametrize(("vocab_size", "pattern", "min_count"), [(600, "gpt2", 0), (4096, "cl100k", 2), (20000, "cl100k", 0)])
def test_merges_equal_tokenizers_on_real_text(code, vocab_size, pattern, min_count):
    ours = Tokenizer.train_from_texts(code, vocab_size, pattern, (), min_count=max(1, min_count))
    theirs = learn_hf(code, vocab_size, PATTERNS[pattern], min_count)
    assert merges_of(ours) == theirs
    assert len(theirs) > 300


@pytest.mark.parametrize("pattern", PATTERNS)
def test_merges_equal_tokenizers_on_mixed_scripts(pattern):
    texts = [mixed_text(seed, 4000) for seed in range(4)]
    ours = Tokenizer.train_from_texts(texts, 1500, pattern, (), min_count=1)
    assert merges_of(ours) == learn_hf(texts, 1500, PATTERNS[pattern], 0)


def test_one_long_run_merges_as_tokenizers_does():
    texts = ["a" * 1000, "ab" * 333 + "a" * 17, " " * 999 + "x", "\n" * 513]
    ours = Tokenizer.train_from_texts(texts, 300, "cl100k", (), min_count=1)
    assert merges_of(ours) == learn_hf(texts, 300, PATTERNS["cl100k"], 0)


def test_the_textbook_example():
    """aaabdaaabac with merges aa, aa+a, aaa+b: 258 100 258 97 99."""
    tokenizer = Tokenizer.train_from_texts(["aaabdaaabac"], 259, "gpt2", (), min_count=1, byte_order="raw")
    assert tokenizer.encode("aaabdaaabac") == [258, 100, 258, 97, 99]


def test_counts_beyond_32_bits():
    words = {b"ab": 1 << 33, b"cd": (1 << 33) + 1, b"abcd": 3}
    merges = learn_merges(pack(words), BYTE_ORDERS["raw"], 3)
    assert merges == [(99, 100), (97, 98), (257, 256)]


def test_files_are_learnt_as_their_texts(tmp_path, code):
    for number, text in enumerate(code[:6]):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8", newline="")
    stages = []
    from_files = Tokenizer.train([tmp_path], 700, progress=lambda stage, done, total: stages.append((stage, done, total)))
    assert from_files.hash == Tokenizer.train_from_texts(code[:6], 700).hash
    assert ("merge", 443, 443) in stages
    assert stages[0][0] == "count"


def test_processes_count_what_one_process_counts(tmp_path, code):
    file = tmp_path / "all.txt"
    file.write_text("\n".join(code) * 5, encoding="utf-8", newline="")
    assert file.stat().st_size > 4 << 20
    assert Tokenizer.train([file], 600, workers=2).hash == Tokenizer.train([file], 600, workers=1).hash


def test_counting_equals_its_definition(code):
    splitter = Splitter(PATTERNS["cl100k"])
    texts = [*code[:3], mixed_text(1, 5000), "\ud800 lone \udfff", "", *"ab'\n ", "x" * 300_000]
    fast, plain = count_texts(texts, splitter), count_plain(texts, splitter)
    assert unpack(fast) == unpack(plain)
    assert unpack(add([fast, plain])) == {word: 2 * count for word, count in unpack(plain).items()}


def test_past_its_memory_counting_drops_only_words_met_once(code):
    counter, plain = WordCounter(PATTERNS["cl100k"], most=2000), unpack(count_plain(code, Splitter(PATTERNS["cl100k"])))
    for text in code:
        counter.add_texts([text])
    counts = counter.finish()
    table = unpack(counts)
    assert counts.dropped > 0
    assert len(table) < len(plain)
    assert all(count <= plain[word] for word, count in table.items())
    often = sorted(plain, key=plain.__getitem__)[-100:]
    assert all(table[word] >= 0.99 * plain[word] for word in often)
    with pytest.warns(UserWarning, match="left out"):
        train(lambda splitter: counts, 300, "cl100k", (), None, 1, "gpt2")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"vocab_size": 256}, "at least 257"),
        ({"vocab_size": 1 << 22}, "too large"),
        ({"vocab_size": 300, "pattern": "gtp2"}, "gpt2"),
        ({"vocab_size": 300, "pattern": "("}, "does not compile"),
        ({"vocab_size": 300, "byte_order": "row"}, "raw"),
        ({"vocab_size": 300, "special_tokens": ["", "x"]}, "empty"),
    ],
)
def test_bad_arguments_say_what_to_do(arguments, says):
    with pytest.raises(DataError, match=says):
        Tokenizer.train_from_texts(["some text"], **arguments)


@pytest.mark.parametrize("text", ["", None])
def test_nothing_to_learn_from_is_refused(tmp_path, text):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError):
        Tokenizer.train([tmp_path / ("empty.txt" if text == "" else "missing.txt")], 300)


def test_a_small_text_ends_with_fewer_ids_and_the_specials_follow():
    tokenizer = Tokenizer.train_from_texts(["hello hello"], 5000, special_tokens=("<|endoftext|>", "<|user|>"))
    assert tokenizer.vocab_size < 300
    assert tokenizer.special_tokens == {"<|endoftext|>": tokenizer.vocab_size - 2, "<|user|>": tokenizer.vocab_size - 1}


def test_only_pairs_before_the_first_that_was_not_looked_at_are_ahead():
    """(count, left, right) of the cut-off: more often, or as often with a smaller pair; its own equal is not before it."""
    exact, left, right = (np.array(values) for values in ([5, 5, 5, 5, 6, 4], [2, 2, 1, 2, 9, 0], [9, 1, 9, 3, 9, 0]))
    assert _ahead(exact, left, right, (5, 2, 3)).tolist() == [False, True, True, False, True, False]
