"""Nothing that happens to a writer hurts what stands: SIGKILL at any moment, a full disk, no permission, an interrupt."""

import errno
import json
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

from smedjan_common.checkpoint import atomic, find_checkpoints, latest_checkpoint, read_checkpoint, verify_checkpoint
from smedjan_common.errors import CheckpointError
from tests.unit.test_checkpoint import assert_same, facts, sample_snapshot, tree, write, write_final

KILLS = int(os.environ.get("SMEDJAN_KILLS", "20"))  # per way of replacing; a soak sets it to hundreds

# Forks a writer for every line it reads, so that a kill costs no imports. The writer says in ACKS which steps stand.
WRITERS = """
import os, sys
from pathlib import Path
import numpy as np
from smedjan_common.backend import Snapshot
from smedjan_common.checkpoint import atomic, find_checkpoints, prune_checkpoints, write_checkpoint, write_final
from smedjan_common.config import ModelConfig
from smedjan_common.params import parameter_table

MODEL = ModelConfig(vocab_size=256, dim=64, layers=2, heads=4, kv_heads=4, ffn_dim=256)
FACTS = dict(model=MODEL, train=None, tokenizer_json="{}", tokenizer_hash="t", dataset=None, framework={})

def snapshot(step):
    params = {name: np.full(spec.shape, step, np.float32) for name, spec in parameter_table(MODEL).items()}
    return Snapshot(step, params, {f"{slot}.{name}": array for slot in ("mu", "nu") for name, array in params.items()})

def write_forever(run, acks):
    found = find_checkpoints(run)
    step = found[-1].step if found else 0
    while True:
        step += 1
        write_checkpoint(run, snapshot(step), **FACTS)
        os.write(acks, b"%d\\n" % step)
        write_checkpoint(run, snapshot(step), **FACTS)
        write_final(run, snapshot(step), **FACTS)
        os.write(acks, b"final\\n")
        prune_checkpoints(run, 2)

if __name__ == "__main__":
    run, acks = Path(sys.argv[1]), os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    if sys.argv[3] == "moved-aside":
        atomic._exchange = lambda one, other: False
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
from smedjan_common.checkpoint import atomic, find_checkpoints, prune_checkpoints, read_checkpoint, write_final
from tests.unit.test_checkpoint import assert_same_arrays, facts, sample_snapshot, write, write_checkpoint

if sys.argv[2] == "moved-aside":
    atomic._exchange = lambda one, other: False
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
    finals = [path for name, path in {"final": run / "final", **atomic.replaced_names(run)}.items() if name == "final" and path.exists()]
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
    with atomic.atomic_directory(tmp_path / "step-00000009") as temporary:
        (temporary / "half").write_text("half")
        write(tmp_path, 1)  # a thread of this process
        writer = "import sys; from pathlib import Path; from tests.unit.test_checkpoint import write; write(Path(sys.argv[1]), 2)"
        subprocess.run([sys.executable, "-c", writer, str(tmp_path)], check=True, cwd=Path(__file__).parents[2])
        assert (temporary / "half").exists()
    assert tree(tmp_path / "step-00000009") == {"half": b"half"}
    reused, fresh, stale = (tmp_path / f".tmp-step-00000009-{os.getpid()}-0000000{i}" for i in range(3))
    for path in (reused, fresh, stale):
        path.mkdir()
    (reused / atomic.LOCK_NAME).touch()  # nobody holds it: another process had this number
    os.utime(reused, (0, 0))
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


@pytest.mark.parametrize("step", [2, 3], ids=["new", "replacing"])
@pytest.mark.parametrize("at", [0, 1, 5, 14])
def test_a_disk_that_fills_up_leaves_the_older_checkpoints_whole(tmp_path, monkeypatch, step, at):
    write(tmp_path, 1)
    write(tmp_path, 3)
    before, calls = tree(tmp_path), iter(range(1000))

    def fill(file, data):
        if next(calls) >= at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file.write(data)

    monkeypatch.setattr("smedjan_common.checkpoint.tensors._write_all", fill)
    with pytest.raises(CheckpointError) as caught:
        write(tmp_path, step)
    assert str(caught.value) == (
        f"The checkpoint step-0000000{step} could not be written to {tmp_path}. No space left on device: it takes 0.0 MB. "
        "Older checkpoints are whole. Free some space, lower --keep, or choose another disk with --checkpoint-dir."
    )
    assert tree(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_a_disk_without_room_is_seen_before_it_is_filled(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr("smedjan_common.checkpoint.write.write_tensors", lambda *args: pytest.fail("wrote"))
    with pytest.raises(CheckpointError, match="No space left"):
        write(tmp_path / "run")


@pytest.mark.parametrize("when", ["tensors", "rename"])
def test_an_interrupt_leaves_no_trace(tmp_path, monkeypatch, when):
    write(tmp_path)

    def interrupt(*args):
        raise KeyboardInterrupt

    target = {"tensors": "smedjan_common.checkpoint.tensors._write_all", "rename": "smedjan_common.checkpoint.atomic._replace"}[when]
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


def in_subprocess(code: str, *args: object) -> str:
    """Run Python code in a process of its own, from the repository's root; returns what it printed."""
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]).stdout


def test_a_limit_on_file_sizes_is_an_error_that_leaves_older_checkpoints_whole(tmp_path):
    write(tmp_path, 1)
    before = tree(tmp_path)
    code = """
import resource, sys
from pathlib import Path
from tests.unit.test_checkpoint import write
from smedjan_common.errors import CheckpointError
resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
try:
    write(Path(sys.argv[1]), 2)
except CheckpointError as error:
    print(error)
"""
    said = in_subprocess(code, tmp_path)
    assert f"could not be written to {tmp_path}. File too large" in said
    assert "ulimit -f" in said
    assert tree(tmp_path) == before


def test_a_real_full_file_system_is_an_error_that_leaves_older_checkpoints_whole(tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(disk)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small tmpfs can only be mounted by root outside a container; RLIMIT_FSIZE stands in for it above")
    try:
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr("shutil.disk_usage", lambda path: usage)  # otherwise it is seen beforehand
        write(disk, 1)
        before = tree(disk)
        with pytest.raises(CheckpointError, match="No space left on device"):
            write(disk, 2)
        assert tree(disk) == before
        shutil.rmtree(disk / "step-00000001")
        write(disk, 2)
        verify_checkpoint(disk / "step-00000002")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_directory_without_permission_is_an_error(tmp_path):
    code = """
import os, sys, tempfile
from pathlib import Path
from tests.unit.test_checkpoint import write, prune_checkpoints, read_checkpoint
from smedjan_common.errors import CheckpointError
with tempfile.TemporaryDirectory() as place:
    run = Path(place) / "run"
    write(run, 1), write(run, 2), write(run, 3)
    os.chmod(place, 0o755), os.chmod(run, 0o555), os.chmod(run / "step-00000003" / "model.safetensors", 0)
    child = os.fork()
    if child == 0:
        if os.geteuid() == 0:
            os.setgid(65534), os.setuid(65534)  # root may write anywhere
        acts = [lambda: write(run, 4), lambda: write(run / "below"), lambda: prune_checkpoints(run, 1), lambda: read_checkpoint(run)]
        for act in acts:
            try:
                act()
            except CheckpointError as error:
                print(str(error).replace(str(run), "RUN"), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
    os.chmod(run, 0o755)
"""
    new, below, prune, read = in_subprocess(code).splitlines()
    assert new == (
        "The checkpoint step-00000004 could not be written to RUN. Permission denied. Older checkpoints are whole. "
        "Make the directory writable, or choose another with --checkpoint-dir."
    )
    assert "could not be written to RUN/below. Permission denied" in below
    assert prune == "An old checkpoint in RUN cannot be removed. Permission denied. Make the directory writable."
    assert "RUN/step-00000003/model.safetensors cannot be read. Permission denied" in read
    assert "newest good checkpoint beside it is RUN/step-00000002" in read


def test_a_path_through_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match="A part of the path is a file"):
            write(directory)


MEMORY = """
import json, sys
from pathlib import Path
import numpy as np
from smedjan_common.backend import Snapshot
from smedjan_common.checkpoint import read_checkpoint, verify_checkpoint, write_checkpoint
from smedjan_common.config import ModelConfig
from smedjan_common.params import parameter_table

def high_water():
    try:
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
    except OSError:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS

what, run = sys.argv[1], Path(sys.argv[2])
model = ModelConfig(vocab_size=8192, dim=512, layers=3, heads=8, kv_heads=8, ffn_dim=1536)
if what == "write":
    params = {name: np.full(spec.shape, 0.5, np.float32) for name, spec in parameter_table(model).items()}
    slots = {f"{slot}.{name}": array.copy() for slot in ("mu", "nu") for name, array in params.items()}
    before = high_water()
    facts = dict(train=None, tokenizer_json=None, tokenizer_hash=None, dataset=None, framework={})
    write_checkpoint(run, Snapshot(1, params, slots), model=model, **facts)
else:
    before = high_water()
    kept = verify_checkpoint(run / "step-00000001") if what == "verify" else read_checkpoint(run)
print(json.dumps([model.num_params() * 12, high_water() - before]))
"""


def test_memory_does_not_double(tmp_path):
    for what, share in (("write", 0.0), ("read", 1.0), ("verify", 0.0)):
        size, grown = json.loads(in_subprocess(MEMORY, what, tmp_path))
        assert size > 120e6
        assert grown < (share + 0.2) * size, f"{what}: {grown / size:.2f} of the model's bytes"


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
