"""Conversations as tokens: both ends of every mask, what of a talk is left out, the file of the mask, batches that leave the rest out."""

import json

import numpy as np
import pytest

from smedjan_common.data.batches import batches, held_out
from smedjan_common.data.chats import ChatCut, encode_talk, prepare_chats
from smedjan_common.data.mix import mix
from smedjan_common.data.order import IGNORED
from smedjan_common.data.token_file import TokenFile, mask_path
from smedjan_common.errors import DataError, TemplateError
from smedjan_common.text.conversations import Talk
from smedjan_common.text.sources import find
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.tokenizer.chat import ChatML
from smedjan_common.tokenizer.chat_files import ChatSource
from smedjan_common.tokenizer.chat_template import REFUSED

TURNS = [
    {"role": "system", "content": "You are a smith."},
    {"role": "user", "content": "What is <|im_end|> iron?"},
    {"role": "assistant", "content": "\nA metal."},
    {"role": "user", "content": "And gold?"},
    {"role": "assistant", "content": "One too."},
]


@pytest.fixture(scope="module")
def tokenizer():
    text = "What is iron? A metal. And gold? One too.\n\nuser assistant system smith\n" * 40
    return Tokenizer.train_from_texts([text], 320, special_tokens=("<|endoftext|>", "<|im_start|>", "<|im_end|>"))


def talk(trained=(True, True), turns=TURNS):
    return Talk(list(turns), list(trained), "here:1", 1)


def write(folder, tokenizer, rows, most=200, val=0.0, **cut):
    """(token file, the one that is held out, what was dropped)."""
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    cut = ChatCut(most, **{"max_dropped": 1.0} | cut)
    paths = folder / "t.bin", folder / "v.bin" if val else None
    dropped = prepare_chats(find([folder / "chats.jsonl"], field=""), paths[0], tokenizer, ChatML(), cut, paths[1], val)
    return TokenFile.open(paths[0]), TokenFile.open(paths[1]) if paths[1] else None, dropped


def trained_text(tokenizer, ids, mask):
    """The stretches that are trained."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]])))
    return [tokenizer.decode(ids[start:stop]) for start, stop in edges.reshape(-1, 2)]


def test_an_answer_is_trained_from_its_first_token_to_its_end_and_nothing_else(tokenizer):
    ids, mask = encode_talk(tokenizer, ChatML(), talk())
    assert trained_text(tokenizer, ids, mask) == ["\nA metal.<|im_end|>", "One too.<|im_end|>"]
    assert ids[-1] == tokenizer.encode("\n")[0]
    assert not mask[-1]
    assert (ids == tokenizer.special_tokens["<|im_end|>"]).sum() == len(TURNS), "a name in a message is text"


def test_training_sees_the_ids_that_generation_sees(tokenizer):
    ids, mask = encode_talk(tokenizer, ChatML(), talk())
    first, prompt = int(np.argmax(mask)), ChatML().encode(tokenizer, TURNS[:2])
    assert ids[:first].tolist() == prompt
    assert tokenizer.decode(ids[first:][: len(tokenizer.encode("\nA metal."))]) == "\nA metal."


def test_answers_that_are_left_out_and_texts_that_are_trained_whole(tokenizer):
    ids, mask = encode_talk(tokenizer, ChatML(), talk((False, True)))
    assert trained_text(tokenizer, ids, mask) == ["One too.<|im_end|>"]
    ids, mask = encode_talk(tokenizer, ChatML(), talk((True, True)), "all")
    assert mask.tolist() == [False] + [True] * (len(ids) - 1)
    ids, mask = encode_talk(tokenizer, ChatML(), talk((False, True)), "all")
    assert "A metal" not in "".join(trained_text(tokenizer, ids, mask))


def test_too_long_ones_are_dropped_or_cut_and_no_end_is_invented(tokenizer, tmp_path):
    whole = len(encode_talk(tokenizer, ChatML(), talk())[0])
    file, _, dropped = write(tmp_path, tokenizer, [TURNS, TURNS[:3]], whole - 2)
    assert file.documents.tolist() == [0]
    assert dropped.counts == {f"longer than {whole - 2} tokens": 1}
    file, _, dropped = write(tmp_path, tokenizer, [TURNS], whole - 2, too_long="truncate")
    assert (file.num_tokens, file.mask[-1], dropped.counts.total()) == (whole - 2, 1, 0)
    assert file.tokens[-1] != tokenizer.special_tokens["<|im_end|>"]
    with pytest.raises(DataError, match="No conversation is left"):
        write(tmp_path, tokenizer, [TURNS], 12, too_long="truncate")


def test_too_many_dropped_rows_are_refused_and_leave_no_file(tokenizer, tmp_path):
    with pytest.raises(DataError, match="1 of 2 rows would be dropped"):
        write(tmp_path, tokenizer, [TURNS, TURNS[:2]], max_dropped=0.4)
    assert {path.name for path in tmp_path.iterdir()} == {"chats.jsonl"}


def test_a_part_is_held_out_by_the_hash_of_the_row(tokenizer, tmp_path):
    rows = [[{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": f"{n * n}"}] for n in range(300)]
    train, val, _ = write(tmp_path, tokenizer, rows, val=0.2)
    held = {tuple(part) for part in np.split(val.tokens, val.documents[1:].astype(int))}
    assert 30 < len(held) < 90
    train, val, _ = write(tmp_path, tokenizer, rows[::-1][:150], val=0.2)
    assert {tuple(part) for part in np.split(val.tokens, val.documents[1:].astype(int))} < held
    assert len(train.documents) + len(val.documents) == 150


@pytest.mark.parametrize(("fault", "why"), [("changed", "was changed"), ("short", "is damaged"), ("gone", "has no mask")])
def test_a_mask_is_held_against_its_manifest_when_it_is_opened(tokenizer, tmp_path, fault, why):
    file, _, _ = write(tmp_path, tokenizer, [TURNS])
    data = bytearray(mask_path(file.path).read_bytes())
    data[3] ^= 1
    mask_path(file.path).write_bytes(data if fault == "changed" else data[:-1])
    if fault == "gone":
        mask_path(file.path).unlink()
    with pytest.raises(DataError, match=why):
        TokenFile.open(file.path)


def test_the_hash_of_a_file_is_of_its_mask_too(tokenizer, tmp_path):
    one = write(tmp_path, tokenizer, [TURNS])[0]
    two = write(tmp_path, tokenizer, [TURNS], train_on="all")[0]
    assert one.manifest["sha256"] == two.manifest["sha256"]
    assert one.hash != two.hash
    two.verify()


@pytest.mark.parametrize("packing", ["documents", "windows"])
def test_batches_leave_out_what_is_not_trained(tokenizer, tmp_path, packing):
    file, _, _ = write(tmp_path, tokenizer, [TURNS, TURNS[:3], TURNS[:3]])
    data = batches(file, file.num_tokens - 1, 1, 0, packing, documents=True)
    inputs, targets, documents = data.batch(0)
    counted = targets != IGNORED
    assert counted.sum() == file.mask.sum()
    assert sorted(targets[counted]) == sorted(file.tokens[file.mask == 1])
    ends = targets[0] == tokenizer.special_tokens["<|im_end|>"]
    assert ends.sum() == 4, "of the questions none is trained"
    assert len(set(documents[0][inputs[0] == tokenizer.special_tokens["<|im_start|>"]])) == 3


def test_validation_sees_every_row_once_and_its_padding_counts_nothing(tokenizer, tmp_path):
    file, _, _ = write(tmp_path, tokenizer, [TURNS] * 5)
    length = int(file.num_tokens // 5) + 3
    found = list(held_out(file, length, 2, documents=True))
    assert [targets.shape for _, targets, _ in found] == [(2, length)] * 3
    assert sum(int((targets != IGNORED).sum()) for _, targets, _ in found) == int(file.mask.sum())
    assert len(list(held_out(file, length, 2, 1))) == 1


def test_a_mixture_of_conversations_is_refused(tokenizer, tmp_path):
    file, _, _ = write(tmp_path, tokenizer, [TURNS])
    with pytest.raises(DataError, match="holds conversations"):
        mix([(file.path, 1.0)], tmp_path / "m.bin")


def test_a_template_that_hides_its_answers_is_refused_and_its_refusals_are_dropped(tokenizer):
    pytest.importorskip("jinja2")
    from smedjan_common.tokenizer.chat_jinja import JinjaTemplate

    forgets = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content if loop.last else m.content.split('!')[-1] }}<|im_end|>{% endfor %}"
    )
    turns = [TURNS[1], {"role": "assistant", "content": "hm! A metal."}, TURNS[1], TURNS[4]]
    with pytest.raises(TemplateError, match="changes earlier turns"):
        encode_talk(tokenizer, JinjaTemplate(ChatSource(forgets), tokenizer), talk(turns=turns))
    with pytest.raises(TemplateError) as caught:
        encode_talk(tokenizer, JinjaTemplate(ChatSource(forgets), tokenizer), talk((True,), turns[1:3]))
    assert caught.value.case == REFUSED
