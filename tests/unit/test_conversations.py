"""Conversations: every kind of row, what is wrong named by its line, what teaches nothing dropped and counted."""

import json

import pytest

from smedjan_common.errors import DataError
from smedjan_common.text.conversations import Dropped, conversations
from smedjan_common.text.sources import find

HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


def read(folder, *rows, name="chats.jsonl"):
    """(talks, what was dropped) of a file of JSON lines."""
    path, dropped = folder / name, Dropped()
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return list(conversations(find([path], field=""), dropped)), dropped


@pytest.mark.parametrize(
    "row",
    [
        {"messages": HI, "prompt": "Hi", "id": 3},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, HI[1]]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
        {"conversations": HI},
        {"instruction": "Hi", "input": "", "output": "Hello.", "text": "### Instruction: Hi"},
        {"prompt": "Hi", "completion": "Hello."},
        {"prompt": "Hi", "response": "Hello."},
        {"prompt": HI[:1], "completion": HI[1:]},
        {"question": "Hi", "answer": "Hello."},
    ],
)
def test_every_kind_gives_the_same_conversation(tmp_path, row):
    [talk], dropped = read(tmp_path, row)
    assert talk.messages == HI
    assert talk.trained == [True]
    assert talk.place.endswith("chats.jsonl:1")
    assert not dropped.counts


def test_alpaca_has_input_system_and_history(tmp_path):
    row = {"instruction": "Add", "input": "1 and 2", "output": "3", "system": "Be short.", "history": [["Hi", "Hello."]]}
    [talk], _ = read(tmp_path, row)
    assert talk.messages == [
        {"role": "system", "content": "Be short."},
        *HI,
        {"role": "user", "content": "Add\n\n1 and 2"},
        {"role": "assistant", "content": "3"},
    ]


@pytest.mark.parametrize("switch", [{"weight": 0}, {"train": False}, {"training": False}])
def test_an_answer_may_be_left_out_of_the_loss(tmp_path, switch):
    [talk], _ = read(tmp_path, {"messages": [HI[0], HI[1] | switch, *HI]})
    assert talk.trained == [False, True]


def test_json_and_parquet_are_read_as_lines_are(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"messages": HI}, {"messages": HI}], indent=1))
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([{"messages": HI}]), tmp_path / "b.parquet")
    talks = list(conversations(find([tmp_path], field=""), Dropped()))
    assert [talk.messages for talk in talks] == [HI] * 3
    assert [talk.place.rpartition("/")[2] for talk in talks] == ["a.json:1", "a.json:2", "b.parquet:0"]


def test_a_blank_line_is_no_row_and_does_not_move_the_numbers(tmp_path):
    talks, dropped = read(tmp_path, {"messages": HI}, "", {"messages": HI}, "")
    assert [talk.place.rpartition(":")[2] for talk in talks] == ["1", "3"]
    assert dropped.rows == 2


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ('{"messages": [', "is not JSON"),
        ("[1]", "not an object"),
        ({"foo": 1}, "no kind that is known"),
        ({"prompt": "Hi", "completion": "Hello."}, "kind prompt/completion"),
        ({"messages": "Hi"}, "not a list"),
        ({"messages": [{"content": "Hi"}]}, "not an object with role"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1 is 3, not a text"),
        ({"messages": [{"role": "user"}]}, "message 1 is missing, not a text"),
        ({"messages": [HI[0], HI[1] | {"weight": 0.5}]}, "neither 0 nor 1"),
    ],
)
def test_a_wrong_row_is_an_error_with_its_line(tmp_path, row, why):
    with pytest.raises(DataError, match=why) as caught:
        read(tmp_path, {"messages": HI}, row)
    assert "2" in caught.value.what


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "Hi", "chosen": "Hello.", "rejected": "No."}, "preference"),
        ({"chosen": HI, "rejected": HI}, "preference"),
        ({"input": {"messages": HI[:1]}, "preferred_output": HI[1:], "non_preferred_output": HI[1:]}, "preference"),
        ({"messages": HI, "rejected_response": "No."}, "preference"),
        ({"prompt": "Hi", "completion": "Hello.", "label": True}, "KTO"),
        ({"text": "Once"}, "text"),
    ],
)
def test_rows_of_other_use_are_refused_by_name(tmp_path, row, kind):
    with pytest.raises(DataError, match=f"kind {kind}"):
        read(tmp_path, row)


def test_rows_that_teach_nothing_are_dropped_counted_and_shown(tmp_path):
    useless = [
        ({"messages": HI[:1]}, "no answer of an assistant"),
        ({"messages": [HI[0], {"role": "assistant", "content": " \n"}]}, "an empty answer"),
        ({"messages": [HI[0], HI[1] | {"weight": 0}]}, "no answer that is trained"),
        ({"messages": [{"role": "narrator", "content": "Once"}, HI[1]]}, "the role 'narrator' is not known"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, HI[1]]},
            "a message has a part that is no text",
        ),
        ({"messages": HI, "tools": [{"type": "function"}]}, "it offers tools, which no template here is told of"),
    ]
    talks, dropped = read(tmp_path, {"messages": HI}, *(row for row, _ in useless), *[useless[0][0]] * 4)
    assert len(talks) == 1
    assert dropped.rows == 11
    assert dropped.counts == {reason: 1 for _, reason in useless} | {useless[0][1]: 5}
    lines = dropped.lines()
    assert lines[0] == "5 of 11 rows dropped: no answer of an assistant."
    assert [line.partition(": ")[0].rpartition(":")[2] for line in lines[1:4]] == ["2", "8", "9"]
    assert lines[4] == "1 of 11 rows dropped: an empty answer."
    dropped.check(1.0)
    with pytest.raises(DataError, match="10 of 11 rows would be dropped"):
        dropped.check(0.05)


def test_plain_text_is_no_file_of_conversations(tmp_path):
    with pytest.raises(DataError, match="It is text"):
        read(tmp_path, "Once upon a time.", name="a.txt")
