"""Files that are whole or not there: one sync, who lives, what is swept; and a journal that cannot remove what is not its own."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smedjan_common.commands import process as process_command
from smedjan_common.data.journal import Journal
from smedjan_common.data.token_file import TokenFileWriter
from smedjan_common.files import durable, leftovers
from smedjan_common.files.atomic_directory import atomic_directory
from smedjan_common.files.atomic_file import atomic_file, atomic_path, write_atomically
from tests.unit.test_checkpoint import write

ROOT = Path(__file__).parents[2]
HERE, DAY = leftovers.host_name(), 86_400


@pytest.fixture(scope="module")
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def age(path: Path, seconds: float) -> None:
    for place in (*(path.iterdir() if path.is_dir() else ()), path):
        os.utime(place, (time.time() - seconds,) * 2)


# sync


@pytest.mark.parametrize("kind", ["file", "checkpoint", "token file"])
def test_on_macos_every_write_goes_through_the_cache_of_the_drive(tmp_path, monkeypatch, kind):
    full, plain = [], []
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda fd, command: full.append(command))
    monkeypatch.setattr(os, "fsync", plain.append)
    if kind == "file":
        write_atomically(tmp_path / "x", b"x")
    elif kind == "checkpoint":
        write(tmp_path, 1)
    else:
        with TokenFileWriter(tmp_path / "x.bin", 300, "hash"):
            pass
    assert set(full) == {51}
    assert plain == []


def test_where_a_file_system_lacks_it_fsync_does_and_a_broken_disk_is_told(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(os, "fsync", calls.append)
    with open(tmp_path / "x", "wb") as file:
        for number, expected in ((errno.ENOTSUP, 1), (errno.ENOTTY, 2)):
            monkeypatch.setattr(fcntl, "fcntl", raiser(OSError(number, "no")))
            durable.sync(file.fileno())
            assert len(calls) == expected
        monkeypatch.setattr(fcntl, "fcntl", raiser(OSError(errno.EIO, "broken")))
        with pytest.raises(OSError, match="broken"):
            durable.sync(file.fileno())


def raiser(error: Exception):
    def fail(*_):
        raise error

    return fail


def test_nothing_syncs_by_another_way():
    files = [file for folder in ("smedjan_common", "smedjan_jax", "smedjan_mlx", "convert") for file in (ROOT / folder).rglob("*.py")]
    assert [file.name for file in files if "os.fsync" in file.read_text() or "F_FULLFSYNC" in file.read_text()] == ["durable.py"]


def test_nothing_is_there_for_a_system_that_is_not_supported():
    """Linux and macOS: a branch for another would be half of something that nobody tests."""
    words = ("msvcrt", "win32", "os.name", "WindowsPath")
    files = [file for folder in ("smedjan_common", "smedjan_jax", "smedjan_mlx", "convert") for file in (ROOT / folder).rglob("*.py")]
    assert [(file.name, word) for file in files for word in words if word in file.read_text(encoding="utf-8")] == []
    assert "It runs on Linux and macOS." in (ROOT / "README.md").read_text(encoding="utf-8")


# who lives


def test_a_process_of_another_user_is_alive(monkeypatch, dead):
    assert not leftovers.is_alive(dead)
    assert leftovers.is_alive(os.getpid())
    assert not leftovers.is_alive(10**30)
    monkeypatch.setattr(os, "kill", raiser(PermissionError()))
    assert leftovers.is_alive(1)


def test_what_another_host_writes_is_dead_only_when_left_alone_for_long(tmp_path, dead):
    """A process number of another host says nothing here, though no process of this one has it."""
    folders = {idle: tmp_path / f".tmp-run{idle}-{dead}@elsewhere-00000000" for idle in (60, 4000, DAY + 60)}
    locked = {idle: tmp_path / f".tmp-locked{idle}-{dead}@elsewhere-00000000" for idle in (60, 4000, DAY + 60)}
    files = {idle: tmp_path / f".tmp-file{idle}-{dead}@elsewhere-00000000" for idle in (60, 4000, DAY + 60)}
    for idle in folders:
        folders[idle].mkdir()
        locked[idle].mkdir()
        (locked[idle] / leftovers.LOCK_NAME).touch()  # nobody holds it, as far as this file system tells
        files[idle].touch()
        for path in (folders[idle], locked[idle], files[idle]):
            age(path, idle)
    held = tmp_path / f".tmp-held-{dead}@elsewhere-00000000"
    held.mkdir()
    with open(held / leftovers.LOCK_NAME, "xb") as file:
        leftovers.lock(file.fileno())
        age(held, 2 * DAY)
        leftovers.remove_leftovers(tmp_path)
        stand = set(tmp_path.iterdir())
    assert stand == {folders[60], folders[4000], locked[60], files[60], files[4000], held}


def test_a_directory_that_another_host_moved_aside_is_not_put_back_over_its_writer(tmp_path, dead):
    aside = tmp_path / f".old-final-{dead}@elsewhere-00000000"
    aside.mkdir()
    leftovers.remove_leftovers(tmp_path)
    assert leftovers.replaced_names(tmp_path) == {"final": aside}
    here = tmp_path / f".old-other-{dead}@{HERE}-00000000"
    here.mkdir()
    leftovers.remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == [aside, tmp_path / "other"]


def test_a_hidden_name_says_who_writes_it_whatever_the_host_is_called(tmp_path, monkeypatch):
    for name, kept in (("Anna's MacBook-Pro.local", "Anna_s_MacBook_Pro.local"), ("", "_"), ("å" * 99, "_" * 24)):
        monkeypatch.setattr("socket.gethostname", lambda name=name: name)
        path = leftovers.hidden("tmp", tmp_path / "step-00000001")
        assert leftovers.parse(path.name) == ("tmp", "step-00000001", os.getpid(), kept)
    assert leftovers.parse(".tmp-step-00000001-12-0123abcd") == ("tmp", "step-00000001", 12, "_" * 24)
    for name in ("tmp-a-1@b-0123abcd", ".tmp-a-b-0123abcd", ".tmp-a/b-1@b-0123abcd", ".DS_Store", ".tmp-of-someone"):
        assert leftovers.parse(name) is None


# what is swept


def test_the_next_writer_sweeps_what_a_killed_one_left(tmp_path):
    code = (
        "import os, sys, time\nfrom smedjan_common.files.atomic_file import atomic_path\n"
        "with atomic_path(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half')\n    print('half', flush=True)\n    time.sleep(60)\n"
    )
    out = tmp_path / "out.jsonl"
    with subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, cwd=ROOT) as writer:
        assert writer.stdout
        assert writer.stdout.readline()
        write_atomically(tmp_path / "other", b"")
        assert len(list(tmp_path.glob(".tmp-*"))) == 1, "its writer lives"
        writer.send_signal(signal.SIGKILL)
    write_atomically(tmp_path / "other", b"")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_cleaner_sweeps_what_killed_cleaners_left_and_nothing_else(tmp_path, dead):
    (tmp_path / "text.txt").write_text("iron and fire\n" * 20)
    for name in (f".tmp-out.jsonl-{dead}@{HERE}-0123abcd", f".tmp-log.jsonl-{dead}@{HERE}-0123abcd", ".tmp-mine", ".out.jsonl.swp"):
        (tmp_path / name).touch()
    assert process_command.main(["--input", str(tmp_path / "text.txt"), "--output", str(tmp_path / "out.jsonl")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.jsonl.swp", ".tmp-mine", "out.jsonl", "text.txt"]


def test_both_kinds_of_writers_sweep_both_kinds(tmp_path, dead):
    for make in (lambda: write_atomically(tmp_path / "a", b""), lambda: write(tmp_path, 1)):
        (tmp_path / f".tmp-x-{dead}@{HERE}-0123abcd").touch()
        (tmp_path / f".tmp-y-{dead}@{HERE}-0123abcd").mkdir()
        make()
        assert not list(tmp_path.glob(".*"))


def test_living_writers_do_not_sweep_each_other(tmp_path):
    with atomic_path(tmp_path / "a") as one, atomic_directory(tmp_path / "b") as other, TokenFileWriter(tmp_path / "c.bin", 300, "hash"):
        one.touch()
        (other / "half").touch()
        write_atomically(tmp_path / "d", b"")
        with TokenFileWriter(tmp_path / "c.bin", 300, "hash"):
            pass
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c.bin", "c.bin.json", "c.bin.offsets", "d"}


def test_parts_without_a_journal_are_swept_by_the_next_writer_of_that_name_and_by_no_other(tmp_path, dead):
    mine, other = (tmp_path / f".part-{name}-{dead}@{HERE}-0123abcd" for name in ("x.bin", "y.bin"))
    mine.touch()
    other.touch()
    write_atomically(tmp_path / "a", b"")
    with TokenFileWriter(tmp_path / "x.bin", 300, "hash"):
        pass
    assert list(tmp_path.glob(".part-*")) == [other]


# journals


def journal(folder: Path, names: list[str], **changes) -> None:
    writer = {"temporary": names, "tokens": 0, "documents": 0, "bytes": 0, "itemsize": 2}
    state = {"key": "x", "pid": 0, "host": HERE, "bundles": 1, "writers": [writer]} | changes
    (folder / ".t.bin.journal").write_text(json.dumps(state))


@pytest.mark.parametrize(
    "name", ["letter.txt", "../letter.txt", "{victim}", ".part-../../letter.txt-1-0123abcd", ".", "", ".part-a\0-1-0123abcd", 5]
)
def test_a_journal_cannot_remove_what_is_no_part_beside_its_output(tmp_path, dead, name):
    run = tmp_path / "run"
    run.mkdir()
    for folder in (run, tmp_path):
        (folder / "letter.txt").write_text("dear")
    name = str(tmp_path / "letter.txt") if name == "{victim}" else name
    journal(run, [name, name], pid=dead)
    assert Journal([run / "t.bin"], [], []).load() is None
    assert [(folder / "letter.txt").read_text() for folder in (run, tmp_path)] == ["dear", "dear"]


def test_a_journal_cannot_remove_the_part_of_a_living_writer(tmp_path, dead):
    with TokenFileWriter(tmp_path / "other.bin", 300, "hash") as writer:
        journal(tmp_path, writer.state()["temporary"], pid=dead)
        assert Journal([tmp_path / "t.bin"], [], []).load() is None
    assert (tmp_path / "other.bin").exists()


def test_the_parts_of_a_dead_journal_of_other_work_go(tmp_path, dead):
    names = [f".part-{name}-{dead}@{HERE}-0123abcd" for name in ("v.bin", "v.bin.offsets")]
    for name in names:
        (tmp_path / name).touch()
    journal(tmp_path, names, pid=dead)
    assert Journal([tmp_path / "t.bin"], [], []).load() is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["another user", "another host"])
def test_a_journal_whose_writer_lives_elsewhere_is_left_alone(tmp_path, monkeypatch, dead, how):
    names = [f".part-{name}-{dead}@elsewhere-0123abcd" for name in ("t.bin", "t.bin.offsets")]
    for name in names:
        (tmp_path / name).touch()
    journal(tmp_path, names, pid=dead, host=HERE if how == "another user" else "elsewhere")
    if how == "another user":
        monkeypatch.setattr(os, "kill", raiser(PermissionError()))
    before = sorted(tmp_path.iterdir())
    taken = Journal([tmp_path / "t.bin"], [], [])
    assert (taken.load(), taken.usable) == (None, False)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "changes", [{"pid": -1}, {"pid": "1"}, {"host": 3}, {"bundles": -1}, {"writers": 3}, {"writers": [5]}, {"key": None}]
)
def test_a_journal_with_odd_values_means_a_fresh_start(tmp_path, dead, changes):
    journal(tmp_path, [], **({"pid": dead} | changes))
    assert Journal([tmp_path / "t.bin"], [], []).load() is None


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("way", [atomic_path, atomic_file])
def test_an_error_while_a_file_is_written_reaches_the_caller_and_leaves_the_old_one(tmp_path, error, way):
    (tmp_path / "a").write_bytes(b"old")

    def fail(place):
        (place.write_bytes if way is atomic_path else place.write)(b"half")
        raise error

    with pytest.raises(error), way(tmp_path / "a") as place:
        fail(place)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old"}


@pytest.mark.parametrize("way", [atomic_path, atomic_file, atomic_directory])
@pytest.mark.parametrize("named", [False, True])
def test_a_full_disk_is_told_with_the_name_of_what_was_to_be_written(tmp_path, way, named):
    with pytest.raises(OSError, match="No space left") as error, way(tmp_path / "a") as place:  # noqa: PT012
        hidden = place.name if way is atomic_file else str(place)
        raise OSError(errno.ENOSPC, "No space left", hidden) if named else OSError(errno.ENOSPC, "No space left")
    assert error.value.filename == str(tmp_path / "a")


def test_a_disk_that_is_read_only_is_told_by_the_name_of_the_output(tmp_path, monkeypatch):
    def refuse(place, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(place))

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OSError, match="Read-only") as error, atomic_file(tmp_path / "a"):
        pass
    assert error.value.filename == str(tmp_path / "a")


def test_an_error_of_what_is_read_meanwhile_keeps_its_name(tmp_path):
    for name in (None, "input"):
        with pytest.raises(OSError, match="output error") as error, atomic_path(tmp_path / "a"):
            raise OSError(errno.EIO, "Input/output error", name)
        assert error.value.filename == name
