"""Inputs as people have them: damaged, named otherwise, in pipes, in folders full of other things."""

import gzip
import json
import os
import threading
import warnings
from pathlib import Path

import pytest

from smedjan_common.commands import prepare as prepare_command
from smedjan_common.commands import tokenizer as tokenizer_command
from smedjan_common.data.prepare import prepare
from smedjan_common.data.token_file import TokenFile
from smedjan_common.errors import DataError, Notice
from smedjan_common.run.data import run_data
from smedjan_common.run.flags import DataFlags
from smedjan_common.text import blocks as text_blocks
from smedjan_common.text.blocks import blocks
from smedjan_common.text.dedup import dedup
from smedjan_common.text.documents import documents
from smedjan_common.text.records import Reading
from smedjan_common.text.sources import find
from smedjan_common.tokenizer import Tokenizer

TEXTS = ["iron", 'a "hammer" of {steel}', "line\nbreak \\ and ]", "日本", ""]
LINES = b"".join(json.dumps({"text": text, "id": number}).encode() + b"\n" for number, text in enumerate(TEXTS))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_from_texts(["the smith's hammer and the iron\n" * 20, "日本"], 300)


def texts_of(path: Path | str, field: str = "text", errors: str = "strict", size: int = text_blocks.BLOCK_BYTES) -> list[str]:
    return [text for block in blocks(find([path], field=field), field=field, size=size) for text in documents(block, field, errors)]


def prepared(path: Path, tokenizer: Tokenizer, **options) -> list[str]:
    """The documents that `prepare` makes of a file."""
    prepare([path], path.parent / "out" / "t.bin", tokenizer, **options)
    file = TokenFile.open(path.parent / "out" / "t.bin")
    assert file.documents is not None
    ends = [*file.documents.tolist()[1:], file.num_tokens]
    return [tokenizer.decode(file.tokens[start : end - 1]) for start, end in zip(file.documents.tolist(), ends, strict=True)]


# Names and kinds

ARRAY = json.dumps([json.loads(line) for line in LINES.splitlines()]).encode()
PRETTY = json.dumps([json.loads(line) for line in LINES.splitlines()], indent=1, ensure_ascii=False).encode()
ONE_AFTER_ANOTHER = b"\n".join(json.dumps(json.loads(line), indent=2).encode() for line in LINES.splitlines())


@pytest.mark.parametrize("name", ["a.json", "a.JSON.gz", "part-00000", "train.00000-of-00008.gz"])
@pytest.mark.parametrize("content", [LINES, b"\xef\xbb\xbf" + LINES, ARRAY, PRETTY], ids=["lines", "mark", "array", "pretty"])
def test_json_is_told_by_its_content(tmp_path, name, content):
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert texts_of(tmp_path / name) == TEXTS


@pytest.mark.parametrize("size", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("content", [ARRAY, PRETTY, ONE_AFTER_ANOTHER, b"[]", b" [\n] "], ids=str.split("array pretty objects empty blank"))
def test_objects_of_json_are_found_wherever_a_block_ends(tmp_path, content, size):
    (tmp_path / "a.json").write_bytes(content)
    assert texts_of(tmp_path / "a.json", size=size) == ([] if len(content) < 9 else TEXTS)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (ARRAY[:-1], "has no end"),
        (ARRAY[:-3], "Before object 5"),
        (ARRAY.replace(b', {"text": "line', b', 7, {"text": "line'), "Before object 3"),
        (ARRAY.replace(b'"iron"', b"iron"), "Object 1 .*is not JSON"),
        (ARRAY.replace(b'"iron"', b"7"), "Object 1 .*no text in the field 'text'"),
        (ARRAY.replace("日".encode(), b"\xff").replace(rb"\u65e5", b"\xff"), "Object 4 .*not UTF-8"),
        (b'{"data": [1]}', "JSON without the field 'text'.*--field"),
        (b'"a text"', "neither JSON lines nor an array"),
    ],
)
def test_json_that_is_no_documents_is_refused_by_object(tmp_path, content, says):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=says):
        texts_of(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", LINES), ("a.md", ARRAY), ("notes", b"[1] Smith, Iron, 1911.\n"), ("a.py", b"{}\n"), ("b", b'{"open": \n'), ("c", b"{iron}")],
)
def test_text_that_only_begins_like_json_is_text(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert texts_of(tmp_path / name) == [content.decode()]


def test_records_without_the_field_are_no_text(tmp_path):
    (tmp_path / "part-0").write_bytes(LINES)
    with pytest.raises(DataError, match=r"JSON without the field 'body'.*--field"):
        texts_of(tmp_path / "part-0", field="body")


@pytest.mark.parametrize(
    ("name", "says"),
    [("a.zip", "Unpack"), ("a.tar.gz", "Unpack"), ("a.tgz", "Unpack"), ("a.csv", "column"), ("a.tsv.zst", "column"),
     ("a.html", "web page"), ("a.ipynb", "notebook"), ("a.PDF", "another program")],
)  # fmt: skip
def test_what_is_no_text_is_refused_by_name_with_what_to_do(tmp_path, name, says):
    (tmp_path / name).write_bytes(b"x,y\n")
    with pytest.raises(DataError, match=f"{name}.*{says}"):
        find([tmp_path / name])


# Rows


def write_parquet(path: Path, values: list, kind: str = "string") -> Path:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    column = pyarrow.array(values, pyarrow.binary())
    column = column.dictionary_encode().cast(pyarrow.dictionary("int32", pyarrow.binary())) if kind == "dictionary" else column
    field = getattr(pyarrow, kind)() if kind != "dictionary" else None
    column = column.view(field) if kind == "string" else column if field is None else column.cast(pyarrow.string()).cast(field)
    parquet.write_table(pyarrow.table({"text": column}), path, row_group_size=2)
    return path


def test_a_column_of_text_that_is_not_utf8_is_refused_by_row_or_replaced(tmp_path, tokenizer):
    file = write_parquet(tmp_path / "a.parquet", [b"iron", None, b"", b"ok", b"caf\xe9 noir", b"end"])
    for workers in (1, 2):
        with pytest.raises(DataError, match=r"Row 4 of .*a\.parquet.*Byte 3 .*0xe9.*--errors replace"):
            prepared(file, tokenizer, workers=workers)
    assert prepared(file, tokenizer, errors="replace") == ["iron", "ok", "caf\ufffd noir", "end"]
    with pytest.raises(DataError, match=r"Row 4"):
        list(Reading().texts(next(iter(Reading().blocks(find([file]))))))


@pytest.mark.parametrize("kind", ["large_string", "string_view"])
def test_every_kind_of_text_column_is_read(tmp_path, kind):
    pyarrow = pytest.importorskip("pyarrow")
    if not hasattr(pyarrow, kind):
        pytest.skip(f"this pyarrow has no {kind}")
    assert texts_of(write_parquet(tmp_path / "a.parquet", [b"iron", None, "日本".encode()], kind)) == ["iron", "", "日本"]


def test_texts_from_a_dictionary_and_nulls_alone_are_read(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": pyarrow.array(["a", "b", "a"]).dictionary_encode()}), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet") == ["a", "b", "a"]
    parquet.write_table(pyarrow.table({"text": pyarrow.nulls(2)}), tmp_path / "b.parquet")
    assert texts_of(tmp_path / "b.parquet") == ["", ""]


def test_bytes_of_a_dataset_that_are_not_utf8_are_refused_by_row_or_replaced(tmp_path, tokenizer):
    pytest.importorskip("datasets")
    (tmp_path / "folder").mkdir()
    write_parquet(tmp_path / "folder" / "train.parquet", [b"iron", b"caf\xe9"])
    name = f"hf:{tmp_path / 'folder'}"
    [block] = blocks(find([name]))
    assert list(documents(block, errors="replace")) == ["iron", "caf\ufffd"]
    with pytest.raises(DataError, match=r"Row 1 of 'hf:.*--errors replace"):
        list(documents(block))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_null_is_a_document_without_text_that_is_counted(tmp_path, tokenizer, name, capsys):
    rows = ["iron", None, "fire", ""]
    if name == "a.parquet":
        write_parquet(tmp_path / name, [row if row is None else row.encode() for row in rows])
    else:
        content = [{"text": row} for row in rows]
        (tmp_path / name).write_text(json.dumps(content) if name == "a.json" else "".join(json.dumps(row) + "\n" for row in content))
    assert prepared(tmp_path / name, tokenizer) == ["iron", "fire"]
    tokenizer.save(tmp_path / "t.json")
    arguments = ["--input", str(tmp_path / name), "--tokenizer", str(tmp_path / "t.json"), "--output", str(tmp_path / "o.bin")]
    assert prepare_command.main(arguments) == 0
    assert "(empty or null): 2\n" in capsys.readouterr().out
    (tmp_path / "b.jsonl").write_text('{"body": null}\n')
    with pytest.raises(DataError, match="no text in the field"):
        texts_of(tmp_path / "b.jsonl")


# Long lines


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_record_longer_than_64_mib_is_refused_by_file_and_place(tmp_path, name, monkeypatch):
    assert text_blocks.LONGEST == 64 << 20
    monkeypatch.setattr(text_blocks, "LONGEST", 64 << 10)

    def write(length: int) -> None:
        lines = [json.dumps({"text": "a"}), json.dumps({"text": "x" * (length - 12)}), json.dumps({"text": "b"})]
        (tmp_path / name).write_text("\n".join(lines) if name == "a.jsonl" else f"[{', '.join(lines)}]")

    for size in (1 << 10, 1 << 12):
        write(64 << 10)
        assert list(map(len, texts_of(tmp_path / name, size=size))) == [1, (64 << 10) - 12, 1]
        write((64 << 10) + (1 if name == "a.jsonl" else size + 1))
        with pytest.raises(DataError, match=rf"(Line|Object) 2 of .*{name}.*longer"):
            texts_of(tmp_path / name, size=size)


# Pipes


@pytest.mark.parametrize("content", [b"iron and fire\n" * 9000, LINES * 300, PRETTY], ids=["text", "lines", "array"])
def test_a_pipe_is_read_like_the_file(tmp_path, tokenizer, content):
    (tmp_path / "file").write_bytes(content)
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(content))
    writer.start()
    assert prepared(tmp_path / "pipe", tokenizer, workers=1) == prepared(tmp_path / "file", tokenizer)
    writer.join()


def test_what_needs_its_input_twice_refuses_a_pipe(tmp_path, tokenizer):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(DataError, match="pipe' can be read only once"):
        prepare([pipe], tmp_path / "t.bin", tokenizer, val_output=tmp_path / "v.bin", val_fraction=0.05)
    with pytest.raises(DataError, match="only once"):
        dedup([str(pipe)], str(tmp_path / "d.jsonl"))
    assert tokenizer_command.main(["--input", str(pipe), "--output", str(tmp_path / "t.json"), "--report"]) == 2
    flags = DataFlags(dataset=(str(pipe),), val_fraction=0.0, tokenizer=None, vocab_size=300)
    with pytest.raises(DataError, match="only once"):
        run_data(flags, frozenset(), tmp_path / "run", None)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="/proc is Linux's")
def test_a_file_that_says_it_has_no_bytes_is_measured(tmp_path, tokenizer):
    """Files of /proc have size 0."""
    prepare(["/proc/self/status"], tmp_path / "t.bin", tokenizer, val_output=tmp_path / "v.bin", val_fraction=0.5)
    train, val = (TokenFile.open(tmp_path / name).num_bytes or 0 for name in ("t.bin", "v.bin"))
    assert 0.2 < val / (train + val) < 0.8


# File names and folders


def test_a_name_that_is_not_utf8_is_read_and_written_down(tmp_path, tokenizer):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")
    try:
        with open(name, "w") as file:
            file.write("iron and fire\n")
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    prepare([tmp_path], tmp_path / "t.bin", tokenizer)
    assert TokenFile.open(tmp_path / "t.bin").manifest["sources"][0]["path"] == name
    assert prepare([name], os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.bin"), tokenizer).documents == 1


def test_what_a_folder_holds_beside_text_is_left_out_and_told(tmp_path):
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (elsewhere / "more.txt").write_text("iron")
    (folder / "a.txt").write_text("iron")
    (folder / "b.json").write_bytes(ARRAY)
    (folder / "package.json").write_text('{"name": "x"}')
    (folder / ".hidden").write_text("no")
    for name in ("one.txt", "two.txt"):
        (folder / name).write_text("iron", encoding="utf-16")
    (folder / "page.html").write_text("<p>")
    (folder / "picture").write_bytes(b"\0\1")
    (folder / "gone.txt").symlink_to(tmp_path / "nothing")
    (folder / "linked").symlink_to(elsewhere)
    os.mkfifo(folder / "pipe")
    with pytest.warns(Notice) as told:
        found = find([folder])
    assert [source.path.name for source in found] == ["a.txt", "b.json"]
    says = str(told[0].message)
    for part in ("2 × UTF-16", "1 × dangling link", "1 × linked folder", "1 × .html", "1 × .json", "1 × binary", "1 × pipe"):
        assert part in says
    with pytest.raises(DataError, match=r"UTF-16.*iconv"):
        texts_of(folder / "one.txt")


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("iron")
    (tmp_path / "locked").mkdir()
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="locked"):
        find([tmp_path])


def test_a_notice_is_one_plain_line_of_a_command(tmp_path, tokenizer, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("iron")
    (tmp_path / "in" / "b.csv").write_text("a,b")
    tokenizer.save(tmp_path / "t.json")
    arguments = ["--input", str(tmp_path / "in"), "--tokenizer", str(tmp_path / "t.json"), "--output", str(tmp_path / "o.bin")]
    assert prepare_command.main(arguments) == 0
    assert capsys.readouterr().err == f"note: left out of {str(tmp_path / 'in')!r}: 1 × .csv (a table).\n"


def test_a_token_file_is_not_read_as_text(tmp_path):
    """Ids of a vocabulary of 300 are often bytes that are UTF-8 without zeros."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("a")
    for name in ("train.bin", "train.bin.json"):
        (tmp_path / "in" / name).write_text("{}" if name.endswith("json") else "\x11\x01C\x01>\x01")
    with pytest.raises(DataError, match=r"is not text to train on\. It is a token file already\. Train on it"):
        find([tmp_path / "in" / "train.bin"])
    with pytest.warns(Notice, match=r"1 × \.bin"):
        assert [source.path.name for source in find([tmp_path / "in"])] == ["a.txt"]


@pytest.mark.parametrize(("value", "why"), [(5, "It is 5, not text."), ([1], r"It is \[1\], not text."), (False, "It is false, not text.")])
def test_a_field_that_is_no_text_is_called_so(tmp_path, value, why):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": value}) + "\n")
    with pytest.raises(DataError, match=rf"Line 1 of .* has no text in the field 'text'\. {why}"):
        texts_of(tmp_path / "a.jsonl")


def test_what_is_named_again_is_read_once_and_told(tmp_path):
    for name in "abcde":
        (tmp_path / f"{name}.txt").write_text("iron")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find([tmp_path])
    with pytest.warns(Notice, match=r"--input names more than once, and it is read once: .*a\.txt\.") as told:
        assert len(find([tmp_path / "a.txt", tmp_path / "b.txt", f"{tmp_path}/./a.txt", tmp_path / "a.txt"])) == 2
    assert len(told) == 1
    with pytest.warns(Notice, match="--dataset names .* and 2 more"):
        assert len(find([tmp_path, tmp_path], "--dataset")) == 5
    with pytest.warns(Notice, match=r"read once: hf:nothing\."):
        find(["hf:nothing", "hf:nothing"])
