"""tokenizer.json: round trip, other tools' ids, hash, refusals."""

import copy
import dataclasses
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smedjan_common.errors import DataError
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.tokenizer.library import LibraryTokenizer

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


@pytest.mark.parametrize("kind", ["own", "library"])
def test_every_change_of_the_special_tokens_changes_the_hash(kind):
    if kind == "library":
        pytest.importorskip("tokenizers")
    names = ("<|endoftext|>", "<|im_start|>")
    document = json.loads(Tokenizer.train_from_texts([TEXT * 3], 300, special_tokens=names).to_json())
    document |= {"normalizer": {"type": "NFC"}} if kind == "library" else {}
    first, second = document["added_tokens"]
    sets = [
        [first, second],
        [first],
        [first, second, {**second, "id": second["id"] + 1, "content": "<|more|>"}],
        [first, {**second, "content": "<|other|>"}],
        [{**first, "id": second["id"]}, {**second, "id": first["id"]}],
        *([[first, {**second, "special": False}]] if kind == "library" else []),
    ]
    made = [Tokenizer.from_json(json.dumps(document | {"added_tokens": each})) for each in sets]
    assert len({each.hash for each in made}) == len(sets)
    assert {type(each).__name__ for each in made} == {"LibraryTokenizer" if kind == "library" else "Tokenizer"}


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
        ("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True}, "not supported here"),
        ("model.vocab", {}, "empty"),
        ("model.vocab", {"日": 1}, "alphabet"),
        ("model.vocab", {"a": 0}, "lacks 255"),
        ("model.merges", ["a b c"], "two parts"),
        ("model.merges", [["Q", "q"]], "merge 1 "),
        ("model", None, "not a tokenizer.json"),
    ],
)
def test_other_tokenizers_are_refused_with_a_reason(tokenizer, path, value, says):
    with pytest.raises(DataError, match=says):
        Tokenizer.from_json(break_it(json.loads(tokenizer.to_json()), path, value))


@pytest.mark.parametrize(("content", "says"), [(b"", "not a tokenizer.json"), (b"{", "not a tokenizer.json"), (b"\xff\xfe", "not UTF-8")])
def test_damaged_files_are_refused(tmp_path, content, says):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(DataError, match=says):
        Tokenizer.load(file)


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(DataError, match="smedjan tokenizer"):
        Tokenizer.load(tmp_path)


# nothing in the file is believed


def deep(document: dict) -> str:
    return json.dumps(document).replace('"model"', '"more": ' + "[" * 100_000 + "]" * 100_000 + ', "model"', 1)


def twice(document: dict) -> str:
    return json.dumps(document).replace('"vocab": {', '"vocab": {"a": 64, ', 1)


HOSTILE = {
    "negative": (lambda d: d["model"]["vocab"].update(zzzz=-1), "the id -1"),
    "thirty million": (lambda d: d["model"]["vocab"].update(zzzz=30_000_000), "the id 30000000"),
    "a fraction": (lambda d: d["model"]["vocab"].update(zzzz=1.5), "the id 1.5"),
    "true": (lambda d: d["model"]["vocab"].update(zzzz=True), "the id True"),
    "not a number": (lambda d: d["model"]["vocab"].update(zzzz=float("nan")), "the id nan"),
    "a word": (lambda d: d["model"]["vocab"].update(zzzz="7"), "the id '7'"),
    "nothing": (lambda d: d["model"]["vocab"].update(zzzz=None), "the id None"),
    "twice": (lambda d: d["model"]["vocab"].update(zzzz=7), "same id 7"),
    "added twice": (lambda d: d["added_tokens"].append({"content": "<|x|>", "id": 3}), "same id 3"),
    "added negative": (lambda d: d["added_tokens"].append({"content": "<|x|>", "id": -3}), "the id -3"),
    "added far away": (lambda d: d["added_tokens"].append({"content": "<|x|>", "id": 10**30}), "the id 10000"),
    "two ids": (lambda d: d["added_tokens"].append({"content": "a", "id": 999}), "'a' has two ids"),
    "one name twice": (lambda d: d["added_tokens"].extend([{"content": "<|x|>", "id": 900}, {"content": "<|x|>", "id": 901}]), "two ids"),
    "no name": (lambda d: d["added_tokens"].append({"content": "", "id": 900}), "Its name is empty"),
    "surrogate": (lambda d: d["added_tokens"].append({"content": "\ud800", "id": 900}), "not Unicode text"),
    "added number": (lambda d: d["added_tokens"].append(5), "no content"),
    "added without id": (lambda d: d["added_tokens"].append({"content": "x"}), "no id"),
    "added object": (lambda d: d.update(added_tokens={"a": 1}), "not a list"),
    "spaces": (lambda d: d["added_tokens"].append({"content": "  ", "id": 900, "special": False}), "'  ' is not special"),
    "lstrip": (lambda d: d["added_tokens"].append({"content": "<|x|>", "id": 900, "lstrip": True}), "'<|x|>' has lstrip"),
    "single_word": (lambda d: d["added_tokens"].append({"content": "<|x|>", "id": 900, "single_word": True}), "has single_word"),
    "dropout": (lambda d: d["model"].update(dropout=0.1), "BPE with dropout"),
    "ignore_merges": (lambda d: d["model"].update(ignore_merges="no"), "ignore_merges is 'no'"),
    "merge twice": (lambda d: d["model"]["merges"].append(d["model"]["merges"][0]), "a merge twice"),
    "merge of numbers": (lambda d: d["model"]["merges"].append([1, 2]), "does not have two parts"),
    "merges": (lambda d: d["model"].update(merges={"a": "b"}), "merges are missing"),
    "vocab": (lambda d: d["model"].update(vocab=["a"]), "vocabulary or its merges are missing"),
    "steps": (lambda d: d["pre_tokenizer"].update(pretokenizers=7), "no list of steps"),
    "a word for a step": (lambda d: d.update(pre_tokenizer="ByteLevel"), "no object but 'ByteLevel'"),
    "split without behavior": (lambda d: d["pre_tokenizer"]["pretokenizers"][0].pop("behavior"), "not supported here"),
    "split without pattern": (lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(pattern=None), "not supported here"),
    "pattern": (lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "("}), "does not compile"),
    "endless": (lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "a{1000000000}"}), "1000000 copies"),
    "nested": (lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "(" * 5000 + ")" * 5000}), "does not compile"),
    "recursion": (lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "(?R)"}), "recursion"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_by_name_and_reason(tokenizer, tmp_path, kind):
    edit, says = HOSTILE[kind]
    document = json.loads(tokenizer.to_json())
    edit(document)
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(document))
    with pytest.raises(DataError, match=says) as caught:
        Tokenizer.load(file)
    assert str(file) in caught.value.what
    assert caught.value.fix


@pytest.mark.parametrize("make", [deep, twice, lambda _: "[]", lambda _: "7", lambda _: '{"model": ' + "9" * 5000 + "}"])
def test_json_that_is_no_tokenizer_is_refused_with_the_file(tokenizer, tmp_path, make):
    file = tmp_path / "tokenizer.json"
    file.write_text(make(json.loads(tokenizer.to_json())))
    with pytest.raises(DataError, match="It is not a tokenizer"):
        Tokenizer.load(file)


def test_a_file_larger_than_any_tokenizer_is_not_read(tmp_path):
    with open(tmp_path / "tokenizer.json", "wb") as file:
        file.truncate(257 << 20)
    with pytest.raises(DataError, match="more than 256 MiB"):
        Tokenizer.load(tmp_path)


def places(value, path=()):
    """Where values stand in a JSON document, each vocabulary and list of merges with its first and last entries only."""
    yield path
    items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for key, inside in items[:3] + items[3:][-2:] if len(items) > 12 else items:
        yield from places(inside, (*path, key))


ODD = (
    None,
    True,
    False,
    -1,
    0,
    7,
    256,
    1 << 21,
    1 << 62,
    10**30,
    0.5,
    float("nan"),
    "",
    "a",
    "a b",
    "\ud800",
    "(",
    [],
    [[]],
    ["a"],
    {},
    {"a": 1},
)
TINY = json.loads(Tokenizer.train_from_texts(["iron iron fire"], 262).to_json())
FUZZ = settings(max_examples=300)


@FUZZ
@given(
    places=st.lists(
        st.tuples(st.sampled_from(sorted(places(TINY), key=str)), st.sampled_from(("put", "pop")), st.sampled_from(ODD)), max_size=3
    )
)
def test_any_change_of_any_value_is_refused_or_gives_a_tokenizer_that_works(places):
    document = copy.deepcopy(TINY)
    for path, how, value in places:
        document = changed(document, path, how, value)
    works_or_is_refused(json.dumps(document))


@FUZZ
@given(
    at=st.integers(0, len(json.dumps(TINY)) - 1),
    kind=st.sampled_from(("cut", "put", "drop", "double")),
    text=st.text(max_size=3) | st.sampled_from(['"', "{", "}", "[", "]", ",", ":", "-", "1e9", "null", "\\ud800"]),
    size=st.integers(1, 40),
)
def test_any_change_of_the_text_is_refused_or_gives_a_tokenizer_that_works(at, kind, text, size):
    whole = json.dumps(TINY)
    rest = {"cut": "", "put": text + whole[at + len(text) :], "drop": whole[at + size :], "double": whole[max(0, at - size) :]}[kind]
    works_or_is_refused(whole[:at] + rest)


def changed(document, path, how, value):
    """The document with `value` put at `path`, or what is there taken out; unchanged where there is no such place any more."""
    if not path:
        return value if how == "put" else document
    place = document
    try:
        for key in path[:-1]:
            place = place[key]
        if how == "put":
            place[path[-1]] = value
        else:
            place.pop(path[-1])
    except (KeyError, IndexError, TypeError, AttributeError):
        pass
    return document


def check_sentences(said: list[str]) -> None:
    assert "there/tokenizer.json" in said[0]
    assert all(said)


def works_or_is_refused(text: str) -> None:
    try:
        tokenizer = Tokenizer.from_json(text, "there/tokenizer.json")
    except DataError as error:
        check_sentences([error.what, error.why, error.fix])
        return
    assert Tokenizer.from_json(tokenizer.to_json()).hash == tokenizer.hash
    if isinstance(tokenizer, LibraryTokenizer):
        import tokenizers

        theirs = tokenizers.Tokenizer.from_str(text)
        theirs.encode_special_tokens = True
        assert tokenizer.encode("iron é fire") == theirs.encode("iron é fire", add_special_tokens=False).ids
        return
    assert tokenizer.decode(tokenizer.encode("iron é <|endoftext|>", "all")) == "iron é <|endoftext|>"
    ids = [*tokenizer.vocabulary.tokens.values(), *tokenizer.special_tokens.values()]
    assert len(set(ids)) == len(ids)
    assert 0 <= min(ids) <= max(ids) < 1 << 21


# what is written is read back


@pytest.mark.parametrize("name", ["the", "a", "§", "Ġthe", "é", "hammer", "", "\ud800"])
def test_a_special_token_that_could_be_an_ordinary_one_is_refused_before_learning(name):
    def never(*_):
        pytest.fail("learnt")

    with pytest.raises(DataError, match=r"cannot name a special token.*Name it <\|"):
        Tokenizer.train_from_texts(["the hammer"], 300, special_tokens=(name,), progress=never)


@pytest.mark.parametrize("name", ["<|endoftext|>", "</s>", "[PAD]", "<pad>", "the end", "<|é|>", "日本", "🙂"])
def test_special_tokens_that_no_text_gives_are_taken_and_read_back(tmp_path, name):
    tokenizer = Tokenizer.train_from_texts(
        ["the hammer </s> [PAD] <pad> the end <|é|> 日本 🙂 "] * 20, 330, special_tokens=(name,), min_count=1
    )
    assert Tokenizer.load(tokenizer.save(tmp_path)).hash == tokenizer.hash
    assert name in tokenizer.special_tokens


def test_a_tokenizer_that_would_be_refused_is_not_written(tmp_path, tokenizer):
    other = Tokenizer(dataclasses.replace(tokenizer.vocabulary, pattern=r"[a[b]]+|."))
    with pytest.raises(DataError, match="inside a set"):
        other.save(tmp_path / "t.json")
    assert list(tmp_path.iterdir()) == []
