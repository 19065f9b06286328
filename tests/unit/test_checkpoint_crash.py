"""Nothing that happens to a writer hurts what stands: SIGKILL at any moment, another writer, an interrupt."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from smedjan_common.checkpoint import find_checkpoints, latest_checkpoint, read_checkpoint, verify_checkpoint
from smedjan_common.files import atomic_directory
from smedjan_common.files.leftovers import LOCK_NAME, replaced_names
from tests.unit.test_checkpoint import assert_same, facts, in_subprocess, sample_snapshot, tree, write, write_final

KILLS = int(os.environ.get("SMEDJAN_KILLS", "20"))  # per way of replacing; a soak sets it to hundreds

# Forks a writer for every line it reads, so that a kill costs no imports. The writer says in ACKS which steps stand.
WRITERS = """
import os, sys
from pathlib import Path
import numpy as np
from smedjan_common.backend import Snapshot
from smedjan_common.files import atomic_directory
from smedjan_common.checkpoint import About, SavedTokenizer, find_checkpoints, prune_checkpoints, write_checkpoint, write_final
from smedjan_common.config import ModelConfig
from smedjan_common.model.params import parameter_table

MODEL = ModelConfig(vocab_size=256, dim=64, layers=2, heads=4, kv_heads=4, ffn_dim=256)
ABOUT = About(model=MODEL, tokenizer=SavedTokenizer("{}", "t"), framework={})

def snapshot(step):
    params = {name: np.full(spec.shape, step, np.float32) for name, spec in parameter_table(MODEL).items()}
    return Snapshot(step, params, {f"{slot}.{name}": array for slot in ("mu", "nu") for name, array in params.items()})

def write_forever(run, acks):
    found = find_checkpoints(run)
    step = found[-1].step if found else 0
    while True:
        step += 1
        write_checkpoint(run, snapshot(step), ABOUT)
        os.write(acks, b"%d\\n" % step)
        write_checkpoint(run, snapshot(step), ABOUT)
        write_final(run, snapshot(step), ABOUT)
        os.write(acks, b"final\\n")
        prune_checkpoints(run, 2)

if __name__ == "__main__":
    run, acks = Path(sys.argv[1]), os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    if sys.argv[3] == "moved-aside":
        atomic_directory._exchange = lambda one, other: False
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            write_forever(run, acks)
        print(pid, flush=True)
        os.waitpid(pid, 0)
        print("dead", flush=True)
"""


@pytest.mark.parametrize("way", ["swapped", "moved-aside"])
def test_a_run_survives_sigkill_at_any_moment(tmp_path, way):
    run, acks = tmp_path / "run", tmp_path / "acks"
    script = tmp_path / "writers.py"
    script.write_text(WRITERS)
    rng = random.Random(way)
    leftovers = 0
    command = [sys.executable, str(script), str(run), str(acks), way]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as writers:
        assert writers.stdin
        assert writers.stdout
        for kill in range(KILLS):
            print(kill, file=writers.stdin)
            pid = int(writers.stdout.readline())
            time.sleep((0.3 if kill == 0 else 0) + rng.random() * 0.12)
            os.kill(pid, signal.SIGKILL)
            assert writers.stdout.readline() == "dead\n"
            check_run(run, acks.read_text().split() if acks.exists() else [])
            leftovers += any(path.name.startswith(".") for path in run.iterdir())
        writers.stdin.close()
    assert leftovers > KILLS // 10, "no kill fell into a write: the test proves nothing"
    for path in run.iterdir():
        assert path.name == "final" or path.name.startswith((".", "step-"))
    write(run, 1_000_000)
    assert not [path for path in run.iterdir() if path.name.startswith(".")], "the next writer cleans up"


# Dies before its n-th call that changes the file system, for every n, until a writer gets through: every crash point there is.
EVERY_POINT = """
import os, shutil, sys
from pathlib import Path
from smedjan_common.files import atomic_directory
from smedjan_common.checkpoint import find_checkpoints, prune_checkpoints, read_checkpoint, write_final
from tests.unit.test_checkpoint import assert_same_arrays, facts, sample_snapshot, write, write_checkpoint

if sys.argv[2] == "moved-aside":
    atomic_directory._exchange = lambda one, other: False
run, good = Path(sys.argv[1]) / "run", Path(sys.argv[1]) / "good"
for step in (1, 2, 3):
    write(good, step)
write_final(good, sample_snapshot(3), **facts())
changed = sample_snapshot(3)
changed.params["norm.weight"][:] = 7

def die_before(call, left):
    def counted(*args, **options):
        left[0] -= 1
        if left[0] == 0:
            os._exit(9)
        return call(*args, **options)
    return counted

def write_and_die(n):
    left = [n]
    for name in ("mkdir", "rename", "unlink", "rmdir", "fsync"):
        setattr(os, name, die_before(getattr(os, name), left))
    write_checkpoint(run, changed, **facts())
    write_final(run, changed, **facts())
    prune_checkpoints(run, 1)
    os._exit(0)

n, status = 0, 9
while status == 9:
    n += 1
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(good, run)
    child = os.fork()
    if child == 0:
        write_and_die(n)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for again in (False, True):
        skipped = []
        assert find_checkpoints(run, on_skip=skipped.append)[-1].step == 3 and not skipped, (n, skipped)
        for path in (run, run / "final", *(found.path for found in find_checkpoints(run))):
            weights = read_checkpoint(path).snapshot
            expected = changed if weights.params["norm.weight"][0] == 7 else sample_snapshot(weights.step)
            assert_same_arrays(weights.params, expected.params)
        if not again:
            write(run, 4, name="later")
            assert not [path for path in run.iterdir() if path.name.startswith(".")], (n, list(run.iterdir()))
print(n, status)
"""


@pytest.mark.parametrize("way", ["swapped", "moved-aside"])
def test_a_run_survives_a_death_at_each_step_of_writing(tmp_path, way):
    points, status = in_subprocess(EVERY_POINT, tmp_path, way).split()
    assert (int(points) > 35, status) == (True, "0")


def check_run(run: Path, acked: list[str]) -> None:
    """Everything that looks like a checkpoint is one, and no step that was said to stand is lost."""
    skipped: list[str] = []
    found = find_checkpoints(run, on_skip=skipped.append)
    assert skipped == []
    for step, path in found:
        checkpoint = read_checkpoint(path)
        assert all((array == step).all() for array in checkpoint.snapshot.params.values())
        assert all((array == step).all() for array in checkpoint.snapshot.optimizer.values())
    steps = [int(word) for word in acked if word != "final"]
    if steps:
        assert found[-1].step >= steps[-1]
        assert latest_checkpoint(run) == found[-1].path
        assert read_checkpoint(run).step == found[-1].step
    finals = [path for name, path in {"final": run / "final", **replaced_names(run)}.items() if name == "final" and path.exists()]
    assert finals or "final" not in acked
    for path in finals:
        verify_checkpoint(path)


def test_a_directory_moved_aside_is_still_found_and_put_back(tmp_path):
    path = write(tmp_path)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    path.rename(tmp_path / f".old-{path.name}-{dead.pid}-0123abcd")
    assert_same(read_checkpoint(tmp_path), sample_snapshot())
    assert latest_checkpoint(tmp_path)
    write(tmp_path, 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]
    shutil.copytree(path, tmp_path / f".old-{path.name}-{dead.pid}-0123abcd")
    write(tmp_path, 5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004", "step-00000005"]


def test_the_temporary_directory_of_a_living_writer_is_left_alone_and_of_a_dead_one_removed(tmp_path):
    with atomic_directory.atomic_directory(tmp_path / "step-00000009") as temporary:
        (temporary / "half").write_text("half")
        write(tmp_path, 1)  # a thread of this process
        writer = "import sys; from pathlib import Path; from tests.unit.test_checkpoint import write; write(Path(sys.argv[1]), 2)"
        subprocess.run([sys.executable, "-c", writer, str(tmp_path)], check=True, cwd=Path(__file__).parents[2])
        assert (temporary / "half").exists()
    assert tree(tmp_path / "step-00000009") == {"half": b"half"}
    reused, fresh, stale = (tmp_path / f".tmp-step-00000009-{os.getpid()}-0000000{i}" for i in range(3))
    for path in (reused, fresh, stale):
        path.mkdir()
    (reused / LOCK_NAME).touch()  # nobody holds it: another process had this number
    for path in (reused / LOCK_NAME, reused):
        os.utime(path, (0, 0))
    os.utime(stale, (0, 0))
    (tmp_path / ".trash-step-00000001-1-00000000").mkdir()
    (tmp_path / ".tmp-of-someone-else").mkdir()
    write(tmp_path, 3)
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == {fresh.name, ".tmp-of-someone-else"}


def test_two_writers_of_one_step_leave_one_whole_checkpoint(tmp_path):
    write(tmp_path)
    failures: list[BaseException] = []

    def write_often():
        try:
            for _ in range(25):
                write(tmp_path)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write_often) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert_same(read_checkpoint(tmp_path), sample_snapshot())
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("when", ["tensors", "rename"])
def test_an_interrupt_leaves_no_trace(tmp_path, monkeypatch, when):
    write(tmp_path)

    def interrupt(*args):
        raise KeyboardInterrupt

    target = {"tensors": "smedjan_common.checkpoint.tensors._write_all", "rename": "smedjan_common.files.atomic_directory._replace"}[when]
    monkeypatch.setattr(target, interrupt)
    before = tree(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path)
    assert tree(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_everything_is_on_the_disk_before_the_name_is_and_the_name_before_the_call_returns(tmp_path, monkeypatch):
    events: list[int | str] = []
    fsync, rename = os.fsync, Path.rename

    def record_fsync(fd):
        events.append(os.fstat(fd).st_ino)
        fsync(fd)

    def record_rename(self, target):
        events.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    path = write(tmp_path / "run")
    inodes = {p.stat().st_ino: p.name for p in (*path.iterdir(), path, path.parent, tmp_path)}
    names = [event if isinstance(event, str) else inodes[event] for event in events]
    files = ["model.safetensors", "optimizer.safetensors", "tokenizer.json", "checkpoint.json"]
    assert names == [tmp_path.name, *files, path.name, "rename", "run"]


def test_final_is_whole_at_every_moment_while_it_is_replaced(tmp_path):
    write_final(tmp_path, sample_snapshot(1), **facts())
    done = threading.Event()

    def replace():
        for step in range(2, 40):
            write_final(tmp_path, sample_snapshot(step), **facts())
        done.set()

    thread = threading.Thread(target=replace)
    thread.start()
    while not done.is_set():
        assert (tmp_path / "final" / "model.safetensors").stat().st_size > 0
    thread.join()


def test_a_directory_goes_although_a_thread_of_its_writer_still_makes_files_in_it(tmp_path):
    started = threading.Event()

    def keep_writing(folder: Path) -> None:
        end = time.monotonic() + 0.15
        while time.monotonic() < end:
            with contextlib.suppress(FileNotFoundError):  # the folder is gone
                (folder / f"late-{time.monotonic_ns()}").touch()
            started.set()

    def write_and_fail() -> None:
        with atomic_directory.atomic_directory(tmp_path / "run") as temporary:
            threading.Thread(target=keep_writing, args=(temporary,)).start()
            started.wait()
            raise OSError("no more")

    with pytest.raises(OSError, match="no more"):
        write_and_fail()
    assert list(tmp_path.iterdir()) == []
