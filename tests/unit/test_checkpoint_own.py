"""A backend's own checkpoint without the backend: NumPy writes the arrays. It is whole, found, pruned, refused as a neutral one is."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smedjan_common.checkpoint import (
    FORMAT,
    ORBAX,
    Background,
    find_checkpoints,
    latest_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    read_info,
    start_own,
    verify_checkpoint,
)
from smedjan_common.checkpoint.own import check_readable
from smedjan_common.errors import CheckpointError
from tests.unit.test_checkpoint import facts, flip, in_subprocess, sample_snapshot, tree, write
from tests.unit.test_checkpoint_faults import sign, truncate, value


def begin(step: int, folder: Path) -> Callable[[], None]:
    """Stands for a framework: makes the folder at once and the arrays when it is waited for."""
    (folder / "state" / "d").mkdir(parents=True)
    (folder / "orbax.checkpoint").touch()

    def wait() -> None:
        snapshot = sample_snapshot(step)
        np.savez(folder / "state" / "d" / "all.npz", **snapshot.params, **snapshot.optimizer)

    return wait


def start(directory: Path, step: int = 3, begins: Callable[[int, Path], Callable[[], None]] = begin, **changes: Any) -> Callable[[], Path]:
    snapshot = sample_snapshot(step)
    arrays = {"params": snapshot.params, "optimizer_arrays": snapshot.optimizer}
    return start_own(directory, lambda folder: begins(step, folder), kind="orbax", step=step, **arrays, **facts(**changes))


def write_own(directory: Path, step: int = 3) -> Path:
    return start(directory, step)()


def test_it_stands_when_it_is_whole_and_not_before(tmp_path):
    finish = start(tmp_path)
    assert find_checkpoints(tmp_path) == []
    assert latest_checkpoint(tmp_path) is None
    path = finish()
    assert path == tmp_path / "orbax-00000003"
    info = verify_checkpoint(path)
    about = facts()["about"]
    assert (info.format, info.step, info.optimizer, info.model, info.train) == (ORBAX, 3, "adamw", about.model, about.train)
    assert info.dataset == about.dataset
    assert set(info.files) == {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} - {"checkpoint.json"}
    assert {name: record.shape for name, record in info.weights.items()} == {n: a.shape for n, a in sample_snapshot().params.items()}
    assert info.slots.keys() == sample_snapshot().optimizer.keys()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_both_kinds_are_found_by_step_and_of_one_step_the_neutral_one_is_newest(tmp_path):
    write_own(tmp_path, 2)
    write(tmp_path, 1)
    write_own(tmp_path, 3)
    assert [found.path.name for found in find_checkpoints(tmp_path)] == ["step-00000001", "orbax-00000002", "orbax-00000003"]
    assert latest_checkpoint(tmp_path) == tmp_path / "orbax-00000003"
    assert read_info(tmp_path).format == ORBAX
    write(tmp_path, 3)
    assert latest_checkpoint(tmp_path) == tmp_path / "step-00000003"
    assert read_info(tmp_path).format == FORMAT


def test_keep_counts_both_kinds_and_keep_every_saves_its_steps(tmp_path):
    for step in range(1, 9):
        (write if step % 2 else write_own)(tmp_path, step)
    prune_checkpoints(tmp_path, 2, keep_every=3)
    assert [found.step for found in find_checkpoints(tmp_path)] == [3, 6, 7, 8]


def test_a_reader_of_neutral_ones_refuses_it_with_the_command_that_helps(tmp_path):
    path = write_own(tmp_path)
    command = f"convert {path} {tmp_path / 'step-00000003'} --to neutral"
    for read in (read_checkpoint, lambda p: check_readable(read_info(p), "mlx")):
        with pytest.raises(CheckpointError, match="format orbax") as caught:
            read(path)
        assert command in caught.value.fix
    check_readable(read_info(path), "jax")


def spoil(action: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda path: action(path / "arrays" / "state" / "d" / "all.npz")


def linked_folder(path: Path) -> None:
    (path / "arrays").rename(path / "elsewhere")
    (path / "arrays").symlink_to("elsewhere")


def linked_file(path: Path) -> None:
    path.rename(path.parents[3] / "other.npz")
    path.symlink_to(path.parents[3] / "other.npz")


EMPTY = {"bytes": 0, "sha256": ""}

# name -> (how step 3 is spoiled, what the message must say)
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (spoil(lambda p: truncate(p, 9)), r"all\.npz is damaged.*It has 9 bytes"),
    "bit": (spoil(lambda p: flip(p, -2)), r"all\.npz is damaged.*SHA-256"),
    "gone": (spoil(Path.unlink), r"all\.npz is missing"),
    "link": (spoil(linked_file), r"all\.npz is a symbolic link"),
    "folder a link": (linked_folder, r"arrays is a symbolic link"),
    "one more": (spoil(lambda p: p.with_name("more").touch()), r"more is an extra file"),
    "tokenizer": (lambda p: flip(p / "tokenizer.json", 3), r"tokenizer\.json is damaged"),
    "no manifest": (lambda p: (p / "checkpoint.json").unlink(), r"checkpoint\.json is missing"),
    "edited": (lambda p: (p / "checkpoint.json").write_text((p / "checkpoint.json").read_text().replace("2.5", "2.4")), "was edited"),
    "newer": (value("format_version", 2), r"format 2.*Install a newer smedjan"),
    "says neutral": (value("format", FORMAT), r"checkpoint\.json cannot be used"),
    "other step": (value("step", 4), "is of step 4"),
    "path trick": (value("files", {"arrays/../../x": EMPTY}), r"writes below arrays only"),
    "hidden file": (value("files", {"arrays/.x": EMPTY}), r"writes below arrays only"),
    "another shape": (lambda p: sign(p, lambda v: v["tensors"]["params"]["norm.weight"].update(shape=[9])), r"norm\.weight has shape"),
    "third group": (lambda p: sign(p, lambda v: v["tensors"].update(more={})), "It lists params and optimizer"),
    "tensors a list": (value("tensors", []), "cannot be used"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_refused_by_name_and_the_newest_complete_one_is_offered(tmp_path, fault):
    write(tmp_path, 1)
    write_own(tmp_path, 2)
    spoiling, message = FAULTS[fault]
    spoiling(write_own(tmp_path, 3))
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        verify_checkpoint(tmp_path / "orbax-00000003")
    assert latest_checkpoint(tmp_path, on_skip=(told := []).append) == tmp_path / "orbax-00000002"
    assert len(told) == 1
    if fault != "bit" and fault != "tokenizer":  # those only hashes see
        with pytest.raises(CheckpointError, match=r"newest complete checkpoint beside it is .*orbax-00000002"):
            read_info(tmp_path / "orbax-00000003")


def test_a_neutral_one_under_its_name_is_refused(tmp_path):
    write(tmp_path, 3).rename(tmp_path / "orbax-00000003")
    with pytest.raises(CheckpointError, match="does not fit the name"):
        read_info(tmp_path / "orbax-00000003")


@pytest.mark.parametrize("moment", ["begin", "wait"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("a bug")])
def test_a_failure_leaves_the_older_ones_whole_and_nothing_half(tmp_path, moment, error):
    def fail() -> None:
        raise error

    def begins(step: int, folder: Path) -> Callable[[], None]:
        wait = begin(step, folder)
        if moment == "begin":
            fail()
        wait()
        return fail

    write_own(tmp_path, 1)
    before = tree(tmp_path)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else RuntimeError) as caught:
        start(tmp_path, 2, begins)()
    if isinstance(error, OSError):
        assert "The checkpoint orbax-00000002 could not be written" in str(caught.value)
        assert "Older checkpoints are intact. Free some space" in str(caught.value)
    assert tree(tmp_path) == before


# As EVERY_POINT of test_checkpoint_crash: dies before its n-th call that changes the file system, for every n.
EVERY_POINT = """
import os, shutil, sys
from pathlib import Path
from smedjan_common.checkpoint import find_checkpoints, prune_checkpoints, verify_checkpoint
from tests.unit.test_checkpoint_own import start, write_own

run, good = Path(sys.argv[1]) / "run", Path(sys.argv[1]) / "good"
for step in (1, 2):
    write_own(good, step)

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
    start(run, 3)()
    prune_checkpoints(run, 1)
    os._exit(0)

n, status, seen = 0, 9, set()
while status == 9:
    n += 1
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(good, run)
    child = os.fork()
    if child == 0:
        write_and_die(n)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    skipped = []
    found = find_checkpoints(run, on_skip=skipped.append)
    assert not skipped and found[-1].step in (2, 3), (n, skipped, found)
    for _, path in found:
        verify_checkpoint(path)
    seen.add(found[-1].step)
    write_own(run, 4)
    assert not [path for path in run.iterdir() if path.name.startswith(".")], (n, list(run.iterdir()))
print(n, status, sorted(seen))
"""


def test_it_survives_a_death_at_each_step_of_writing(tmp_path):
    points, status, *seen = in_subprocess(EVERY_POINT, tmp_path).split()
    assert int(points) > 30
    assert (status, "".join(seen)) == ("0", "[2,3]")


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    events: list[int | str] = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.fstat(fd).st_ino), fsync(fd))[1])
    monkeypatch.setattr(Path, "rename", lambda self, target: (events.append("rename"), rename(self, target))[1])
    path = write_own(tmp_path)
    before = events[: events.index("rename")]
    assert {entry.stat().st_ino for entry in (path, *path.rglob("*"))} <= set(before)
    assert tmp_path.stat().st_ino in events[events.index("rename") :]


def test_background_writes_one_at_a_time_and_raises_where_it_is_asked():
    writes = Background()
    assert writes.take() is None
    writes.start(lambda: time.sleep(0.2) or Path("a"))
    assert writes.take() is None, "it is still being written"
    with pytest.raises(AssertionError):
        writes.start(lambda: Path("b"))
    assert writes.take(wait=True) == Path("a")
    assert writes.take() is None, "it is told once"

    def fail() -> Path:
        raise CheckpointError("What.", "Why.", "Fix.")

    writes.start(fail)
    with pytest.raises(CheckpointError, match="What"):
        writes.take(wait=True)
    writes.start(lambda: Path("c"))
    assert writes.take(wait=True) == Path("c")


def test_no_framework_is_imported_to_find_and_verify_it(tmp_path):
    write_own(tmp_path)
    code = f"from smedjan_common.checkpoint import *; verify_checkpoint(latest_checkpoint({str(tmp_path)!r}))"
    code += "; import sys; assert not {'jax', 'orbax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
