"""Cleaning: every rule drops what it names and keeps the rest, changes are counted, provenance is kept."""

import contextlib
import json

import pytest

from smedjan_common.commands import process as command
from smedjan_common.errors import DataError
from smedjan_common.text.filters import LINE_RULES, PRESETS, RULES, choose, filter_lines, first_broken
from smedjan_common.text.process import NORMALISATIONS, process
from smedjan_common.text.records import Reading
from smedjan_common.text.sources import find

GOOD = (
    "The smith took the iron from the fire and laid it on the anvil with care. Nobody in the town could have said when he began to work "
    "there, but all of them knew the sound of his hammer. In the morning people came to look at what he had made during the night. "
    "Some bought a lock or a knife, others only stood near the door to be warm. He never asked for much, and that was why they liked him."
)
BAD: dict[str, str] = {
    "gopher_words": "Too short to keep.",
    "gopher_word_length": GOOD + " " + "x" * 2000,
    "gopher_symbols": GOOD.replace(" ", " # ", 20),
    "gopher_bullets": "\n".join(f"- {sentence}" for sentence in GOOD.split(". ")),
    "gopher_ellipsis_lines": "\n".join(f"{sentence}…" for sentence in GOOD.split(". ")),
    "gopher_letters": GOOD + " 1234" * 40,
    "gopher_stop_words": "hammer " * 60,
    "gopher_repeated_lines": GOOD + "\nand so on" * 5,
    "gopher_repeated_paragraphs": GOOD + "\n\nand so on" * 5,
    "gopher_repeated_line_characters": GOOD + ("\n" + GOOD[:400]) * 2,
    "gopher_repeated_paragraph_characters": GOOD + ("\n\n" + GOOD[:400]) * 2,
    "gopher_top_2gram": GOOD + " hot iron" * 40,
    "gopher_top_3gram": GOOD + " very hot iron" * 30,
    "gopher_top_4gram": GOOD + " such very hot iron" * 20,
    "c4_sentences": "One sentence is all there is here, however long it goes on.",
    "c4_lorem_ipsum": GOOD + " Lorem ipsum dolor sit amet.",
    "c4_curly_brackets": GOOD + " int main() { return 0; }",
    **{f"gopher_repeated_{n}grams": GOOD + " " + GOOD[:200] for n in range(5, 11)},
}


@pytest.mark.parametrize("name", RULES)
def test_each_rule_drops_its_text_and_keeps_good_prose(name):
    assert first_broken(GOOD, [name]) is None
    broken = first_broken(BAD[name], [name])
    assert broken is not None
    assert broken[0] == name


def test_line_rules_leave_out_lines():
    text = "A sentence that stays.\nno end\nTwo words.\nPlease enable JavaScript now.\n\nAnd this one stays."
    kept, taken = filter_lines(text, list(LINE_RULES))
    assert kept == "A sentence that stays.\n\nAnd this one stays."
    assert taken == {"c4_line_end": 1, "c4_line_words": 1, "c4_javascript": 1}
    assert filter_lines(text, []) == (text, {})


def test_presets_name_rules_and_single_ones_can_be_taken_away():
    assert set(choose(["gopher"])[0]) == set(choose(["gopher-quality", "gopher-repetition"])[0])
    assert set(choose(["gopher", "c4"])[0]) | set(choose(["c4"])[1]) == set(RULES) | set(LINE_RULES)
    assert "gopher_words" not in choose(["gopher", "-gopher_words"])[0]
    assert choose([]) == ([], [])
    assert all(PRESETS.values())
    with pytest.raises(DataError, match="gopher_words"):
        choose(["gopher_word"])


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("nfc", "e\u0301", "é"),
        ("newlines", "a\r\nb\rc", "a\nb\nc"),
        ("control", "a\x00b\x07\n\tc\x85", "ab\n\tc"),
        ("trailing", "a \nb\t\n", "a\nb\n"),
    ],
)
def test_normalisations(name, before, after):
    assert NORMALISATIONS[name](before) == after


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def read(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def test_documents_keep_their_fields_and_the_log_has_all(tmp_path):
    records = [{"text": GOOD, "url": "u0", "id": 7}, {"text": "short"}, {"text": " \n"}, {"text": GOOD + "\r\nEnd."}]
    report = process(
        [write(tmp_path / "a.jsonl", records)],
        str(tmp_path / "o.jsonl"),
        rules=["gopher"],
        normalise=["newlines"],
        extra={"url": "elsewhere", "licence": "CC0"},
        log=str(tmp_path / "log.jsonl"),
    )
    kept = read(tmp_path / "o.jsonl")
    assert [record["url"] for record in kept] == ["u0", "elsewhere"]
    assert kept[0]["id"] == 7
    assert kept[1]["text"] == GOOD + "\nEnd."
    assert report.dropped == {"gopher_words": 1, "empty": 1}
    assert (report.documents, report.kept) == (4, 2)
    assert report.samples["gopher_words"][0]["text"] == "short"
    log = read(tmp_path / "log.jsonl")
    assert [entry["kept"] for entry in log] == [True, False, False, True]
    assert log[1]["rule"] == "gopher_words"
    assert log[1]["value"] == 1
    assert [entry["source"] for entry in log] == [f"{tmp_path / 'a.jsonl'}:{line}" for line in (1, 2, 3, 4)]
    assert [entry["url"] for entry in log] == ["u0", "elsewhere", "elsewhere", "elsewhere"]
    assert [entry["licence"] for entry in log] == ["CC0"] * 4


def test_every_record_says_where_it_comes_from(tmp_path):
    """Of a text its file, of a line or object its number from 1, of a row its number from 0; a source that a record has stays."""
    (tmp_path / "a.txt").write_text("iron%fire")
    write(tmp_path / "b.jsonl", [{"text": "one"}, {"text": "two", "source": "elsewhere"}])
    (tmp_path / "c.json").write_text('[{"text": "three"}, {"text": "four"}]')
    names = ["a.txt", "a.txt", "b.jsonl:1", "elsewhere", "c.json:1", "c.json:2"]
    texts = ["iron", "fire", "one", "two", "three", "four"]
    with contextlib.suppress(ImportError):
        import pyarrow
        from pyarrow import parquet

        rows = [f"row {number}" for number in range(5)]
        parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "d.parquet")
        names, texts = [*names, *(f"d.parquet:{number}" for number in range(5))], [*texts, *rows]
    reading = Reading(separator="%")
    records = [record for block in reading.blocks(find([tmp_path])) for record in reading.records(block)]
    assert [record["text"] for record in records] == texts
    assert [record["source"].removeprefix(f"{tmp_path}/") for record in records] == names


def test_lone_surrogates_are_written_as_replacement_characters(tmp_path):
    report = process([write(tmp_path / "a.jsonl", [{"text": "a \ud800 b"}])], str(tmp_path / "o.jsonl"))
    assert report.kept == 1
    assert read(tmp_path / "o.jsonl")[0]["text"] == "a \ufffd b"


def test_separators_cut_text_files_and_processes_agree(tmp_path):
    texts = [GOOD * 4 if number % 3 else "short" for number in range(400)]
    (tmp_path / "a.txt").write_text("\n%%\n".join(texts))
    for count in (1, 2):
        reading = Reading(separator="\n%%\n")
        report = process(
            [str(tmp_path / "a.txt")], str(tmp_path / f"{count}.jsonl"), rules=["gopher_words"], reading=reading, processes=count
        )
        assert report.documents == 400
        assert report.dropped == {"gopher_words": 134}
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "2.jsonl").read_bytes()


def test_the_command(tmp_path, capsys):
    file = write(tmp_path / "a.jsonl", [{"text": GOOD}, {"text": "short"}])
    arguments = ["--input", file, "--output", str(tmp_path / "o.jsonl"), "--rules", "gopher", "--report", str(tmp_path / "r.json")]
    assert command.main(arguments) == 0
    assert "1 of 2 documents" in capsys.readouterr().out
    assert json.loads((tmp_path / "r.json").read_text())["dropped"] == {"gopher_words": 1}
    assert command.main(arguments) == 2
    assert command.main([*arguments[:4], "--force", "--rules", "c5"]) == 2
    assert "c4" in capsys.readouterr().err
    assert command.main([*arguments, "--force", "--normalise", "nfx"]) == 2
    assert command.main(["--list-rules"]) == 0
    assert "gopher_words" in capsys.readouterr().out
