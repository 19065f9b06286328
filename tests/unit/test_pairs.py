"""Pairs of answers: every kind of row, the question cut by messages, what is useless dropped by reason, what is wrong named by its line."""

import json

import pytest

from smedjan_common.errors import DataError
from smedjan_common.text.conversations import Dropped
from smedjan_common.text.pairs import pairs
from smedjan_common.text.sources import find

ASKED = [{"role": "user", "content": "What is iron?"}]
GOOD, BAD = [{"role": "assistant", "content": "It is a metal."}], [{"role": "assistant", "content": "It is black."}]
HH = "\n\nHuman: What is iron?\n\nAssistant: "


def read(folder, *rows, name="pairs.jsonl"):
    """(pairs, what was dropped) of a file of JSON lines."""
    path, dropped = folder / name, Dropped()
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return list(pairs(find([path], field=""), dropped)), dropped


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "What is iron?", "chosen": "It is a metal.", "rejected": "It is black.", "id": 1},
        {"question": "What is iron?", "chosen": "It is a metal.", "rejected": "It is black.", "system": ""},
        {"instruction": "What is", "input": "iron?", "chosen": "x", "rejected": "y"},
        {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
        {"prompt": ASKED, "chosen": "It is a metal.", "rejected": BAD[0]},
        {"prompt": ASKED, "chosen": ASKED + GOOD, "rejected": ASKED + BAD},
        {"prompt": "What is iron?", "chosen": ASKED + GOOD, "rejected": ASKED + BAD},
        {"prompt": "What is iron?", "chosen": GOOD, "rejected": BAD},
        {"prompt": HH, "chosen": "It is a metal.", "rejected": "It is black."},
        {"chosen": ASKED + GOOD, "rejected": ASKED + BAD, "score_chosen": 8.5},
        {"chosen": f"{HH}It is a metal.", "rejected": f"{HH}It is black."},
        {"input": {"messages": ASKED}, "preferred_output": GOOD, "non_preferred_output": BAD},
        {"messages": ASKED + GOOD, "rejected_response": "It is black."},
        {"messages": ASKED + GOOD, "rejected_messages": ASKED + BAD},
        {
            "chosen": [{"from": "human", "value": "What is iron?"}, {"from": "gpt", "value": "It is a metal."}],
            "rejected": [{"from": "human", "value": "What is iron?"}, {"from": "gpt", "value": "It is black."}],
        },
    ],
)
def test_every_kind_gives_the_same_pair(tmp_path, row):
    [pair], dropped = read(tmp_path, row)
    if "input" in row and "instruction" in row:
        assert pair.chosen.messages[0]["content"] == "What is\n\niron?"
        return
    assert pair.chosen.messages == ASKED + GOOD
    assert pair.rejected.messages == ASKED + BAD
    assert pair.chosen.trained == pair.rejected.trained == [True]
    assert pair.chosen.place.endswith("pairs.jsonl:1")
    assert not dropped.counts


def test_the_question_is_all_that_both_begin_with_and_its_answers_are_not_trained(tmp_path):
    before = [*ASKED, *GOOD, {"role": "user", "content": "And gold?"}]
    [pair], _ = read(tmp_path, {"chosen": before + BAD, "rejected": before + GOOD})
    assert pair.chosen.trained == pair.rejected.trained == [False, True]
    hh = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    [pair], _ = read(tmp_path, {"chosen": f"{hh} Bluish.", "rejected": f"{hh} Black."})
    assert [message["content"] for message in pair.chosen.messages] == ["a", "b", "c", "Bluish."]
    assert [message["content"] for message in pair.rejected.messages] == ["a", "b", "c", "Black."], "TRL cuts Bl|uish and Bl|ack"
    assert pair.chosen.trained == [False, True]


def test_the_system_text_of_a_row_is_part_of_the_question(tmp_path):
    [pair], _ = read(tmp_path, {"system": "Be short.", "question": "What is iron?", "chosen": "Ore.", "rejected": "Air."})
    assert pair.chosen.messages[0] == pair.rejected.messages[0] == {"role": "system", "content": "Be short."}


def test_pairs_of_one_question_have_one_key(tmp_path):
    rows = [{"prompt": "a", "chosen": f"{n}", "rejected": "no"} for n in range(3)] + [{"prompt": "b", "chosen": "0", "rejected": "no"}]
    found, _ = read(tmp_path, *rows)
    assert len({pair.chosen.key for pair in found[:3]}) == 1
    assert found[3].chosen.key != found[0].chosen.key


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "same", "rejected": "same"}, "the two answers are the same"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "an empty answer"),
        ({"prompt": "a", "chosen": None, "rejected": "b"}, "an empty answer"),
        ({"chosen": ASKED, "rejected": ASKED + BAD}, "no answer of an assistant at the end of both"),
        ({"chosen": ASKED + GOOD, "rejected": [{"role": "user", "content": "What is tin?"}, *BAD]}, "the two answer different questions"),
        ({"chosen": GOOD, "rejected": BAD}, "the answers have no question"),
        ({"prompt": ASKED, "chosen": [{"role": "judge", "content": "b"}], "rejected": BAD}, "the role 'judge' is not known"),
        ({"prompt": "a", "chosen": [GOOD[0] | {"weight": 0}], "rejected": BAD}, "no answer that is trained"),
        ({"input": {"messages": ASKED, "tools": [{}]}, "preferred_output": GOOD, "non_preferred_output": BAD}, "it offers tools"),
    ],
)
def test_what_teaches_nothing_is_dropped_by_its_reason(tmp_path, row, reason):
    found, dropped = read(tmp_path, row)
    assert not found
    [said] = dropped.counts
    assert said.startswith(reason)
    with pytest.raises(DataError, match="1 of 1 rows would be dropped"):
        dropped.check(0.05)


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([{"chosen": "a", "rejected": "b"}], "does not say what was asked"),
        ([{"prompt": 3, "chosen": "a", "rejected": "b"}], "Its prompt is 3, not a text"),
        ([{"prompt": "a", "chosen": 4, "rejected": "b"}], "Its chosen is 4, not a text"),
        ([{"prompt": "a", "chosen": "b"}], "of no kind that is known"),
        ([{"input": "a", "preferred_output": GOOD, "non_preferred_output": BAD}], "not an object with messages"),
        ([{"messages": ASKED + GOOD}], "one answer"),
        ([{"prompt": "a", "completion": "b", "label": True}], "single, good or bad"),
        ([{"text": "Once"}], "It has no answers"),
        (
            [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"chosen": ASKED + GOOD, "rejected": ASKED + BAD}],
            "The rows before it are of the kind preferences with a prompt",
        ),
    ],
)
def test_what_is_wrong_is_an_error_with_its_line(tmp_path, rows, why):
    with pytest.raises(DataError, match=why) as caught:
        read(tmp_path, *rows)
    assert f"pairs.jsonl:{len(rows)}" in str(caught.value)
    assert all((caught.value.what, caught.value.why, caught.value.fix))
