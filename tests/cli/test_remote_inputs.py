"""Inputs at addresses: the same outputs as from files of this machine, whatever the servers do on the way, and no secret in any of them."""

import bz2
import gzip
import hashlib
import http.server
import json
import os
import subprocess
import sys

import pytest

from smedjan_common import cli
from smedjan_common.errors import ConfigError, DataError
from smedjan_common.evaluation.texts import find_texts
from smedjan_common.remote import reading, store
from smedjan_common.remote.address import Address, is_remote, shown
from smedjan_common.text.blocks import blocks
from smedjan_common.text.sources import find
from tests.fakes.store import KEY, SECRET, Door, Fault, put, s3, serving, static_files

for package in ("s3fs", "aiohttp", "moto", "flask", "starlette", "uvicorn"):
    pytest.importorskip(package, reason=f"needs the package {package}: pip install -e '.[remote,oracle]'")
pytestmark = pytest.mark.xdist_group("remote")

ROWS = [{"text": f"A line of text, number {number}: {hashlib.md5(b'%d' % number).hexdigest() * 9}", "n": number} for number in range(900)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture(scope="module")
def bucket():
    with s3() as found:
        put(found, "texts/a.jsonl", JSONL)
        put(found, "texts/more/b.jsonl.gz", gzip.compress(JSONL[: len(JSONL) // 2].rpartition(b"\n")[0]))
        put(found, "texts/c.txt.bz2", bz2.compress(b"Plain words, packed.\n" * 40))
        put(found, "texts/table.csv", b"a,b\n")
        put(found, "texts/.hidden.txt", b"no")
        yield found


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(reading, "PART", 1 << 15)


def local(tmp_path) -> str:
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(JSONL)
    (folder / "more" / "b.jsonl.gz").write_bytes(gzip.compress(JSONL[: len(JSONL) // 2].rpartition(b"\n")[0]))
    (folder / "c.txt.bz2").write_bytes(bz2.compress(b"Plain words, packed.\n" * 40))
    return str(folder)


def smedjan(*words: str) -> int:
    return cli.main([str(word) for word in words])


def content(name: str) -> bytes:
    return b"".join(block.data for block in blocks(find([name])))


def test_every_command_makes_of_addresses_what_it_makes_of_files(bucket: Door, tmp_path, capsys) -> None:
    here, there = local(tmp_path), "s3://bucket/texts"
    for name, inputs in (("here", here), ("there", there)):
        out = tmp_path / name
        out.mkdir()
        assert smedjan("tokenizer", inputs, "--vocab-size", "300", "--output", out / "t.json") == 0
        assert smedjan("process", inputs, "--normalise", "nfc", "--output", out / "p.jsonl", "--log", out / "log.jsonl") == 0
        assert smedjan("dedup", inputs, "--output", out / "d.jsonl") == 0
        split = ("--val-output", out / "v.bin", "--val-fraction", "0.1")
        assert smedjan("prepare", inputs, "--tokenizer", out / "t.json", "--output", out / "x.bin", *split) == 0
    for name in ("t.json", "x.bin", "x.bin.offsets", "v.bin"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes(), name
    for name in ("p.jsonl", "d.jsonl", "log.jsonl"):
        ours = (tmp_path / "here" / name).read_text().replace(here, there)
        assert ours == (tmp_path / "there" / name).read_text()
    manifest = json.loads((tmp_path / "there" / "x.bin.json").read_text())
    assert [source["path"] for source in manifest["sources"]] == [f"{there}/{name}" for name in ("a.jsonl", "c.txt.bz2", "more/b.jsonl.gz")]
    assert "1 × .csv (a table)" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["500", "cut", "silent", "slow"])
def test_what_a_server_does_once_changes_no_byte(bucket: Door, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMEDJAN_REMOTE_TIMEOUT", "0.7")
    bucket.faults = [Fault(kind, "GET", "a.jsonl", 2), Fault("500", "HEAD", "a.jsonl", 1)]
    assert content("s3://bucket/texts/a.jsonl") == JSONL
    assert not any(fault.times for fault in bucket.faults)


def test_a_server_that_stays_broken_is_an_error_that_leaves_nothing(bucket: Door, tmp_path, capsys) -> None:
    bucket.faults = [Fault("cut", "GET", "a.jsonl", 99)]
    out = tmp_path / "x.jsonl"
    assert smedjan("process", "s3://bucket/texts/a.jsonl", "--output", out) == 2
    assert list(tmp_path.iterdir()) == []
    said = capsys.readouterr().err
    assert "Cannot read s3://bucket/texts/a.jsonl." in said
    assert "give the same command again" in said
    bucket.faults = []


def test_an_object_that_changes_while_it_is_read_is_refused(bucket: Door) -> None:
    put(bucket, "changing.jsonl", JSONL)
    read = reading.open_remote(Address("s3://bucket/changing.jsonl"))
    assert read.read(1000) == JSONL[:1000]
    put(bucket, "changing.jsonl", JSONL.replace(b"number 7", b"number 9"))
    with pytest.raises(DataError, match="was changed while it was read"):
        read.read()


def test_refusals_tell_what_to_do_and_no_secret(bucket: Door, tmp_path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.faults = [Fault("403", "HEAD", "secret.txt", 9), Fault("403", "GET", "secret.txt", 9)]
    out = str(tmp_path / "o.jsonl")
    for name, expected in {
        "s3://bucket/secret.txt": "The store refuses these credentials",
        "s3://bucket/none.txt": "There is no text at",
        "s3://bucket/texts/table.csv": "It is a table.",
        "gs://bucket/a.txt": "needs the package gcsfs",
        "nosuch://bucket/a.txt": "fsspec does not know what it is.",
        f"http://me:{SECRET}@127.0.0.1:9/a.txt?X-Amz-Signature={KEY}": "Cannot read http://127.0.0.1:9/a.txt.",
    }.items():
        assert smedjan("process", name, "--output", out) == 2, name
        said = capsys.readouterr().err
        assert expected in said, (name, said)
        assert KEY not in said, said
        assert SECRET not in said, said
        monkeypatch.setenv("SMEDJAN_DEBUG", "1")
        assert smedjan("process", name, "--output", out) == 2
        assert SECRET not in capsys.readouterr().err
        monkeypatch.delenv("SMEDJAN_DEBUG")
    assert smedjan("train", "s3://bucket/texts/a.jsonl", "--checkpoint-dir", tmp_path / "run", "--backend", "jax", "--dry-run") == 2
    assert "takes no text at s3://bucket/texts/a.jsonl" in capsys.readouterr().err
    assert smedjan("process", "s3://bucket/texts/a.jsonl", "--output", "s3://bucket/out.jsonl") == 2
    assert "is an address" in capsys.readouterr().err
    bucket.faults = []


def test_a_web_server_with_ranges_is_read_in_parts(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(JSONL))
    with static_files(tmp_path) as web:
        web.faults = [Fault("cut", "GET", "a.jsonl", 2), Fault("500", "GET", "a.jsonl", 2), Fault("500", "HEAD", "a.jsonl", 1)]
        assert content(f"{web.url}/a.jsonl") == JSONL
        assert not any(fault.times for fault in web.faults)
        assert content(f"{web.url}/b.jsonl.gz") == JSONL
    assert len([target for method, target in web.seen if method == "GET" and "a.jsonl" in target]) > len(JSONL) // reading.PART


@pytest.mark.parametrize("has_length", [True, False])
def test_a_web_server_without_ranges_is_read_whole(has_length: bool) -> None:
    class Plain(http.server.BaseHTTPRequestHandler):
        cut = 0

        def do_HEAD(self) -> None:
            self.send_response(200)
            if has_length:
                self.send_header("Content-Length", str(len(JSONL)))
            self.send_header("ETag", "one")
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(JSONL)

        def log_message(self, *args: object) -> None:
            pass

    with serving(Plain) as url:
        assert content(f"{url}/a.jsonl?signature=abcdef") == JSONL
        assert find([f"{url}/a.jsonl?signature=abcdef"])[0].path.name == "a.jsonl"


def test_parquet_at_an_address(bucket: Door, tmp_path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": [row["text"] for row in ROWS]}), tmp_path / "a.parquet")
    put(bucket, "a.parquet", (tmp_path / "a.parquet").read_bytes())
    assert content("s3://bucket/a.parquet") == content(str(tmp_path / "a.parquet"))


def test_eval_takes_addresses_as_texts(bucket: Door) -> None:
    (text,) = find_texts(["s3://bucket/texts/a.jsonl"], None)
    assert (text.name, text.size) == ("s3://bucket/texts/a.jsonl", len(JSONL))


def test_wildcards(bucket: Door) -> None:
    assert [str(source.path) for source in find(["s3://bucket/texts/*.jsonl"])] == ["s3://bucket/texts/a.jsonl"]


def test_what_is_an_address_and_what_of_it_is_shown() -> None:
    assert not any(map(is_remote, ("a.txt", "c:/a.txt", "hf:name", "/tmp/a:b//c", "./s3/x")))
    assert shown("https://u:p@host/a%20b.txt?token=1#x") == "https://host/a%20b.txt"
    assert shown("s3://key:secret@bucket/who?.txt") == "s3://bucket/who?.txt"
    address = Address("https://h/dir/t%20x.jsonl.gz?s=1")
    assert (address.name, address.suffix, address.suffixes) == ("t x.jsonl.gz", ".gz", [".jsonl", ".gz"])
    assert os.fspath(address / "more") == "https://h/dir/t%20x.jsonl.gz/more?s=1"
    assert "s=1" not in f"{address!r}{address}"


def test_paths_of_this_machine_import_nothing_of_it(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("Words.")
    code = (
        "import sys; from smedjan_common.cli import main; main(['process', 'a.txt', '--output', 'o.jsonl']);"
        "print(sorted(m for m in sys.modules if m in ('fsspec', 'aiohttp', 's3fs', 'smedjan_common.remote.store')))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_without_fsspec_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ConfigError, match=r"pip install 'smedjan\[remote\]'"):
        store.Place("s3://bucket/a")
