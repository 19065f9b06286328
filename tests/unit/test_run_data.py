"""The token files of a run: its texts, what it validates on, the tokenizer that they were made with."""

import dataclasses
import json
import warnings

import numpy as np
import pytest

from smedjan_common.data.prepare import prepare
from smedjan_common.data.token_file import TokenFileWriter
from smedjan_common.errors import DataError, Notice
from smedjan_common.run.data import note_other_beginnings, run_data
from smedjan_common.run.flags import DataFlags
from smedjan_common.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_from_texts(["the smith's hammer and the iron\n" * 20, "日本"], 300)


@pytest.mark.parametrize(("tokens", "is_used"), [(0, False), (1, False), (2, True)])
def test_a_validation_file_without_a_target_is_none(tmp_path, tokenizer, tokens, is_used):
    for name, ids in (("t.bin", list(range(50))), ("v.bin", list(range(tokens)))):
        with TokenFileWriter(tmp_path / name, tokenizer.vocab_size, tokenizer.hash) as writer:
            writer.append(np.array(ids), np.array([0][: len(ids)]), len(ids))
    tokenizer.save(tmp_path / "tokenizer.json")
    flags = DataFlags(dataset=(str(tmp_path / "t.bin"),), val_dataset=(str(tmp_path / "v.bin"),), val_fraction=0.0)
    assert (run_data(flags, frozenset(), tmp_path / "run", None).val is not None) == is_used


@pytest.fixture
def tokenised(tmp_path, tokenizer, monkeypatch):
    """A folder with a text, its token file and the tokenizer under another name, in which no text may be tokenised."""
    (tmp_path / "text.txt").write_text("iron and fire\n" * 100)
    prepare([tmp_path / "text.txt"], tmp_path / "t.bin", tokenizer)
    tokenizer.save(tmp_path / "mine.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("smedjan_common.run.data._tokenise", lambda *_: pytest.fail("it is tokenised first"))
    return tmp_path


@pytest.mark.parametrize(
    ("val", "chosen", "said"),
    [
        ("t.bin", None, "--tokenizer mine.json"),
        ("t.bin", "other.json", "tokenizer"),
        ("gone.bin", None, "There is no token file"),
        ("gone.bin", "mine.json", "There is no token file"),
        ("gone.txt", None, "There is no input"),
        ("t.bin:0", None, "has the weight 0"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_what_cannot_be_validated_on_is_refused_before_texts_are_tokenised(tokenised, val, chosen, said, dry_run):
    Tokenizer.train([tokenised / "text.txt"], vocab_size=257).save(tokenised / "other.json")
    flags = DataFlags(dataset=("text.txt",), val_dataset=(val,), tokenizer=chosen)
    with pytest.raises(DataError, match=said):
        run_data(flags, frozenset(), tokenised / "run", None, dry_run)


def test_a_tokenizer_of_another_name_is_found_by_its_hash_and_others_are_named(tokenised, tokenizer):
    flags = DataFlags(dataset=("t.bin",))
    (tokenised / "broken.json").write_text("{")
    assert run_data(flags, frozenset(), tokenised / "run", None).tokenizer.hash == tokenizer.hash
    Tokenizer.train([tokenised / "text.txt"], vocab_size=257).save(tokenised / "mine.json")
    with pytest.raises(DataError, match=r"nor another file there \(broken\.json, mine\.json\), has its hash"):
        run_data(flags, frozenset(), tokenised / "run", None)
    for name in ("broken.json", "mine.json"):
        (tokenised / name).unlink()
    with pytest.raises(DataError, match=r"No tokenizer\.json beside it has its hash"):
        run_data(flags, frozenset(), tokenised / "run", None)


def test_the_weight_of_a_single_token_file_is_refused_or_told_to_do_nothing(tokenised):
    with pytest.raises(DataError, match="has the weight 0"):
        run_data(DataFlags(dataset=("t.bin:0",)), frozenset(), tokenised / "run", None)
    with pytest.warns(Notice, match=r"the weight of t\.bin does nothing: --dataset names no other file"):
        run_data(DataFlags(dataset=("t.bin:0.5",)), frozenset(), tokenised / "run", None)


def test_what_begins_documents_stands_beside_a_tokenizer_and_a_change_of_it_is_noticed(tmp_path):
    (tmp_path / "text.txt").write_text("iron and fire\n" * 100)
    own = Tokenizer.train([tmp_path / "text.txt"], vocab_size=265, special_tokens=("<|endoftext|>", "<s>"))
    own.save(tmp_path / "tokenizer.json")
    flags = DataFlags(dataset=(str(tmp_path / "text.txt"),), tokenizer=str(tmp_path / "tokenizer.json"), val_fraction=0.1)
    data = {}
    for adds in (False, True, False):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "add_bos_token": adds}))
        data[adds] = run_data(flags, frozenset(), tmp_path / "run", None)
        assert data[adds].tokenizer.bos_id == (own.special_tokens["<s>"] if adds else None), "of texts tokenised before too"
        assert data[adds].train.manifest["bos_id"] == data[adds].tokenizer.bos_id
        assert (data[adds].train.tokens[0] == own.special_tokens["<s>"]) == adds
    assert data[True].train.path != data[False].train.path
    with warnings.catch_warnings(action="error"):
        note_other_beginnings(data[True])
        note_other_beginnings(data[False])
    for adds, there, here in ((False, "none", "<s>"), (True, "<s>", "none")):
        mixed = dataclasses.replace(data[adds], tokenizer=data[not adds].tokenizer, val=None)
        with pytest.warns(Notice, match=f"was prepared with {there} before each document, and the tokenizer begins texts with {here}"):
            note_other_beginnings(mixed)
