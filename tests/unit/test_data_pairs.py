"""Pairs as tokens: one question before both answers, both ends of every mask, and packing that never parts a pair."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smedjan_common.data.batches import batches, held_out
from smedjan_common.data.chats import ChatCut
from smedjan_common.data.order import IGNORED
from smedjan_common.data.packing import PackedPairs
from smedjan_common.data.pairs import prepare_pairs
from smedjan_common.data.token_file import TokenFile, TokenFileWriter
from smedjan_common.errors import DataError
from smedjan_common.text.sources import find
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.tokenizer.chat import ChatML


@pytest.fixture(scope="module")
def tokenizer():
    text = "What is iron? A metal. And gold? It is blue, it is black.\n\nuser assistant\n" * 40
    return Tokenizer.train_from_texts([text], 320, special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))


def write(folder, tokenizer, rows, most=400, val=0.0):
    """(token file, the one that is held out, what was dropped)."""
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = folder / "t.bin", folder / "v.bin" if val else None
    cut = ChatCut(most, max_dropped=1.0)
    dropped = prepare_pairs(find([folder / "pairs.jsonl"], field=""), paths[0], tokenizer, ChatML(), cut, paths[1], val)
    return TokenFile.open(paths[0]), TokenFile.open(paths[1]) if paths[1] else None, dropped


def documents(file):
    """(ids, mask) of each."""
    starts = file.documents[1:].astype(int)
    return list(zip(np.split(file.tokens, starts), np.split(file.mask, starts), strict=True))


def test_both_answers_follow_the_same_ids_and_are_trained_to_their_ends(tokenizer, tmp_path):
    file, _, _ = write(tmp_path, tokenizer, [{"prompt": "What?", "chosen": "It is blue.", "rejected": "\nIt is black."}])
    assert file.pairs
    assert (file.manifest["kind"], file.manifest["template"]) == ("pairs", "chatml")
    (better, its), (worse, other) = documents(file)
    prompt = ChatML().encode(tokenizer, [{"role": "user", "content": "What?"}])
    assert better[: len(prompt)].tolist() == worse[: len(prompt)].tolist() == prompt, "what generation begins with"
    assert tokenizer.decode(better[its == 1]) == "It is blue.<|im_end|>"
    assert tokenizer.decode(worse[other == 1]) == "\nIt is black.<|im_end|>"
    assert np.argmax(its) == np.argmax(other) == len(prompt)


def test_a_pair_that_does_not_fit_is_dropped_whole_and_so_is_one_that_the_tokenizer_cannot_tell(tokenizer, tmp_path):
    short = {"prompt": "What?", "chosen": "Iron.", "rejected": "Gold."}
    file, _, _ = write(tmp_path, tokenizer, [short])
    whole = file.num_tokens
    file, _, dropped = write(tmp_path, tokenizer, [short, short | {"rejected": "Gold. " * 9}], whole)
    assert len(file.documents) == 2
    assert dropped.counts == {f"both answers with their question longer than {whole} tokens": 1}
    with pytest.raises(DataError, match="No pair of answers is left"):
        write(tmp_path, tokenizer, [short], whole - 1)


def test_pairs_of_one_question_are_held_out_together(tokenizer, tmp_path):
    rows = [{"prompt": f"{n // 3}?", "chosen": f"{n} iron", "rejected": f"{n} gold"} for n in range(300)]
    train, val, _ = write(tmp_path, tokenizer, rows, val=0.2)
    questions = [{tuple(ids[: np.argmax(mask)]) for ids, mask in documents(file)} for file in (train, val)]
    assert not questions[0] & questions[1]
    assert 5 < len(questions[1]) < 40
    assert len(val.documents) == 6 * len(questions[1])


def numbered(path, lengths):
    """A file of pairs whose token i is i, of documents of these lengths."""
    with TokenFileWriter(path / "t.bin", 1 << 24, "hash", {"kind": "pairs"}, masked=True) as writer:
        at = 0
        for length in lengths:
            writer.append(np.arange(at, at + length), np.array([0]), length, np.arange(length) > 0)
            at += length
    return TokenFile.open(path / "t.bin")


@given(lengths=st.lists(st.tuples(st.integers(2, 12), st.integers(2, 12)), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_packing_never_parts_a_pair_and_knows_its_documents(lengths, tmp_path_factory):
    file = numbered(tmp_path_factory.mktemp("pairs"), [length for pair in lengths for length in pair])
    cut, starts = PackedPairs(file, 22), file.documents.astype(int)
    rows = np.arange(cut.num_windows)
    numbers, (inputs, targets), own = cut.numbers(rows), cut.read(rows), cut.documents(rows)
    assert sorted(numbers[numbers >= 0]) == list(range(2 * len(lengths)))
    assert cut.num_pairs == len(lengths)
    assert numbers.shape[1] == 2 * cut.pairs_of_row
    assert np.bincount(np.flatnonzero(numbers.ravel() >= 0) // numbers.shape[1]).max() == numbers.shape[1], "the fullest row"
    for row in rows:
        for place, number in enumerate(numbers[row]):
            if number < 0:
                assert not ((own[row] == place) & (targets[row] != IGNORED)).any()
                continue
            assert number % 2 == place % 2
            if place % 2:
                assert numbers[row, place - 1] == number - 1
            length = int(np.diff(np.append(starts, file.num_tokens))[number])
            assert inputs[row][own[row] == place][: length - 1].tolist() == list(range(starts[number], starts[number] + length - 1))


def test_batches_have_the_log_probabilities_of_the_reference(tmp_path):
    file = numbered(tmp_path, [5, 7, 6, 6, 3, 3, 9, 4])
    reference = -np.arange(1, 9, dtype=np.float32)
    data = batches(file, 22, 2, 1, "documents", documents=True, reference=reference)
    inputs, _, own, given_ = data.batch(0)
    assert given_.shape == (2, 2 * data.cut.pairs_of_row)
    assert given_.dtype == np.float32
    for row in range(2):
        for place in range(given_.shape[1]):
            tokens = inputs[row][own[row] == place]
            number = int(np.searchsorted(file.documents, tokens[0], side="right")) - 1 if tokens.any() else -1
            assert given_[row, place] == (reference[number] if number >= 0 else 0)
    plain = batches(file, 22, 2, 1, "documents", documents=True)
    assert not plain.batch(0).reference.any()
    assert np.array_equal(plain.batch(0).inputs, inputs)


def test_validation_sees_every_pair_once(tmp_path):
    file = numbered(tmp_path, [5, 7, 6, 6, 3, 3, 9, 4, 8, 8])
    found = list(held_out(file, 22, 2, documents=True, reference=np.ones(10, np.float32)))
    assert [len(batch) for batch in found] == [4] * len(found)
    assert sum(int((targets != IGNORED).sum()) for _, targets, _, _ in found) == int(file.mask.sum())


def test_a_row_that_is_too_short_and_a_file_of_something_else_are_refused(tmp_path):
    with pytest.raises(DataError, match="--seq-len 12"):
        PackedPairs(numbered(tmp_path, [5, 7, 7, 7]), 11)
    with pytest.raises(DataError, match="holds no pairs"):
        PackedPairs(numbered(tmp_path, [5, 7, 7]), 22)
