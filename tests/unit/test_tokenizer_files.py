"""tokenizer.json: round trip, other tools' ids, hash, refusals."""

import json
import pickle

import pytest

from smedjan_common.errors import DataError
from smedjan_common.tokenizer import Tokenizer

TEXT = "The smith's hammer rings; smiths hammer iron.\n\nIt's 1234 times: é 日本 🙂 <|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_from_texts([TEXT * 3], 400)


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    file = tokenizer.save(tmp_path / "sub" / "tokenizer.json")
    for place in (file, file.parent, str(file)):
        loaded = Tokenizer.load(place)
        assert loaded.hash == tokenizer.hash
        assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
    assert [path.name for path in file.parent.iterdir()] == ["tokenizer.json"]
    assert tokenizer.save(file.parent) == file


def test_the_hash_is_of_the_content_not_of_the_json(tokenizer):
    document = json.loads(tokenizer.to_json())
    again = Tokenizer.from_json(json.dumps(document, indent=4, sort_keys=True))
    assert again.hash == tokenizer.hash
    document["model"]["merges"] = document["model"]["merges"][:-1]
    assert Tokenizer.from_json(json.dumps(document)).hash != tokenizer.hash
    assert Tokenizer.train_from_texts([TEXT * 3], 400, "gpt2").hash != tokenizer.hash


def test_it_can_be_sent_to_a_process(tokenizer):
    tokenizer.encode("warm")
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.hash == tokenizer.hash
    assert copy.encode(TEXT) == tokenizer.encode(TEXT)


def test_tokenizers_and_transformers_read_it(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    file = tokenizer.save(tmp_path)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>")
    assert fast(TEXT)["input_ids"] == tokenizer.encode(TEXT, "all")
    assert fast.eos_token_id == tokenizer.eot_id
    assert len(fast) == tokenizer.vocab_size
    assert fast.decode(tokenizer.encode(TEXT)) == TEXT


def test_what_tokenizers_writes_is_read(tokenizer):
    tokenizers = pytest.importorskip("tokenizers")
    rewritten = tokenizers.Tokenizer.from_str(tokenizer.to_json()).to_str(pretty=True)
    assert Tokenizer.from_json(rewritten).hash == tokenizer.hash


def test_gpt2_style_files_are_read(tokenizer):
    tokenizers = pytest.importorskip("tokenizers")
    ours = Tokenizer.train_from_texts([TEXT * 3], 400, "gpt2")
    document = json.loads(ours.to_json())
    document["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    document["model"]["merges"] = [" ".join(pair) for pair in document["model"]["merges"]]
    again = Tokenizer.from_json(json.dumps(document))
    assert again.hash == ours.hash
    assert again.encode(TEXT, "all") == tokenizers.Tokenizer.from_str(json.dumps(document)).encode(TEXT).ids


def break_it(document: dict, path: str, value: object) -> str:
    *parents, last = path.split(".")
    place = document
    for name in parents:
        place = place[name]
    place[last] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("model.type", "Unigram", "Unigram"),
        ("normalizer", {"type": "NFC"}, "NFC"),
        ("pre_tokenizer", None, "not known here"),
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True}, "not known here"),
        ("model.vocab", {}, "empty"),
        ("model.vocab", {"日": 1}, "alphabet"),
        ("model.vocab", {"a": 0}, "lacks 255"),
        ("model.merges", ["a b c"], "two parts"),
        ("model.merges", [["Q", "q"]], "Merge 1"),
        ("model", None, "no tokenizer.json"),
    ],
)
def test_other_tokenizers_are_refused_with_a_reason(tokenizer, path, value, says):
    with pytest.raises(DataError, match=says):
        Tokenizer.from_json(break_it(json.loads(tokenizer.to_json()), path, value))


@pytest.mark.parametrize(("content", "says"), [(b"", "no tokenizer.json"), (b"{", "no tokenizer.json"), (b"\xff\xfe", "not UTF-8")])
def test_damaged_files_are_refused(tmp_path, content, says):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(DataError, match=says):
        Tokenizer.load(file)


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(DataError, match="smedjan tokenizer"):
        Tokenizer.load(tmp_path)
