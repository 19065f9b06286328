"""A prepare that was killed goes on and ends with the bytes of one that was not."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from smedjan_common.data.journal import Journal
from smedjan_common.data.prepare import prepare
from smedjan_common.data.token_file import TokenFile
from smedjan_common.errors import OutOfMemoryError, WorkerError
from smedjan_common.files.leftovers import host_name
from smedjan_common.text.blocks import BLOCK_BYTES
from smedjan_common.tokenizer import Tokenizer

ARGUMENTS = {"val_fraction": 0.1, "journal_bytes": 1 << 20, "workers": 1}
CODE = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, such as CI may be, start with SIGINT ignored
from smedjan_common.data.prepare import prepare
from smedjan_common.tokenizer import Tokenizer
def slowly(done, total):
    time.sleep(0.15)
arguments = dict(val_fraction=0.1, journal_bytes=1 << 20, workers=1)
prepare([sys.argv[1]], "t.bin", Tokenizer.load("t.json"), val_output="v.bin", progress=slowly, **arguments)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Tokenizer.train_from_texts(["iron and fire, a hammer. " * 20], 280).save("t.json")
    with open("a.jsonl", "w") as file:
        for number in range(300_000):
            file.write(json.dumps({"text": f"document {number} of iron and fire, a hammer."}) + "\n")
    return tmp_path


def stop_in_the_middle(place, how: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", CODE, "a.jsonl"], cwd=place, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (place / ".t.bin.journal").exists() or json.loads((place / ".t.bin.journal").read_text())["bundles"] < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(how)
    process.wait()


def files(place) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in place.iterdir() if ".bin" in path.name and not path.name.endswith(".json")}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_and_gives_the_same_files(place, how):
    stop_in_the_middle(place, how)
    assert not (place / "t.bin").exists()
    bundles = json.loads((place / ".t.bin.journal").read_text())["bundles"]
    calls = []
    tokenizer = Tokenizer.load("t.json")
    resumed = prepare(["a.jsonl"], "t.bin", tokenizer, val_output="v.bin", progress=lambda *done: calls.append(done), **ARGUMENTS)
    after = files(place)
    assert sorted(after) == ["t.bin", "t.bin.offsets", "v.bin", "v.bin.offsets"]
    manifest = TokenFile.open("t.bin").manifest
    TokenFile.open("t.bin").verify()
    fresh = prepare(["a.jsonl"], "t.bin", tokenizer, val_output="v.bin", **ARGUMENTS)
    assert (resumed.resumed, fresh.resumed) == (True, False)
    assert files(place) == after
    assert TokenFile.open("t.bin").manifest == manifest
    assert (resumed.tokens, resumed.documents, resumed.val_bytes) == (fresh.tokens, fresh.documents, fresh.val_bytes)
    size = os.path.getsize("a.jsonl")
    assert calls[-1] == (size, size)
    assert len(calls) <= -(-size // BLOCK_BYTES) - bundles  # what was done is not done again


@pytest.mark.parametrize(
    "error", [WorkerError("A worker process was ended by SIGKILL."), MemoryError(), OutOfMemoryError("Full."), KeyboardInterrupt()]
)
def test_what_lacks_memory_or_is_interrupted_goes_on(tmp_path, error):
    """With fewer workers, say, after the system has taken one."""
    tokenizer = Tokenizer.train_from_texts(["iron and fire, a hammer. " * 20], 280)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("iron and fire, a hammer.\n" * 50_000)
    files, output = [tmp_path / "a.txt", tmp_path / "b.txt"], tmp_path / "out" / "t.bin"

    def stop(done: int, total: int) -> None:
        if done == total:
            raise error

    with pytest.raises(type(error)):
        prepare(files, output, tokenizer, journal_bytes=1 << 20, workers=1, progress=stop)
    assert not output.exists()
    assert prepare(files, output, tokenizer, journal_bytes=1 << 20, workers=1).resumed
    with pytest.raises(ZeroDivisionError):
        prepare(files, output, tokenizer, journal_bytes=1 << 20, workers=1, progress=lambda done, total: 1 / 0 if done == total else None)
    assert sorted(path.name for path in output.parent.iterdir()) == ["t.bin", "t.bin.json", "t.bin.offsets"]


def test_a_journal_of_other_work_is_thrown_away_with_its_files(place):
    stop_in_the_middle(place, signal.SIGKILL)
    assert len([name for name in os.listdir() if name.startswith(".part-")]) == 4
    prepare(["a.jsonl"], "t.bin", Tokenizer.load("t.json"), errors="replace", journal_bytes=1 << 20)
    assert not [name for name in os.listdir() if name.startswith(".")]


def test_a_journal_of_a_running_process_is_left_alone(place):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        (place / ".t.bin.journal").write_text(
            json.dumps({"key": "x", "pid": process.pid, "host": host_name(), "bundles": 1, "writers": []})
        )
        prepare(["a.jsonl"], "t.bin", Tokenizer.load("t.json"), journal_bytes=1 << 20)
        assert (place / ".t.bin.journal").exists()
    finally:
        process.communicate(b"\n")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"writers": 3}', '{"writers": [{}]}'])
def test_a_damaged_journal_means_a_fresh_start(place, content):
    (place / ".t.bin.journal").write_text(content)
    (place / "b.txt").write_text("iron")
    assert Journal(["t.bin"], [], []).load() is None
    assert prepare(["b.txt"], "t.bin", Tokenizer.load("t.json")).documents == 1
