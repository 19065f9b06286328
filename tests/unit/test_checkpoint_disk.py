"""Checkpoints where the disk fails: full, limited, without permission; and how much memory writing and reading takes."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest

from smedjan_common.checkpoint import verify_checkpoint
from smedjan_common.errors import CheckpointError
from tests.unit.test_checkpoint import in_subprocess, tree, write


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
        "Older checkpoints are intact. Free some space, lower --keep, or choose another disk with --checkpoint-dir."
    )
    assert tree(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_a_disk_without_room_is_seen_before_it_is_filled(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr("smedjan_common.checkpoint.write.write_tensors", lambda *args: pytest.fail("wrote"))
    with pytest.raises(CheckpointError, match="No space left"):
        write(tmp_path / "run")


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
from smedjan_common.checkpoint import prune_checkpoints, read_checkpoint
from tests.unit.test_checkpoint import write
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
        "The checkpoint step-00000004 could not be written to RUN. Permission denied. Older checkpoints are intact. "
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
from smedjan_common.checkpoint import About, read_checkpoint, verify_checkpoint, write_checkpoint
from smedjan_common.config import ModelConfig
from smedjan_common.model.params import parameter_table

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
    write_checkpoint(run, Snapshot(1, params, slots), About(model=model, framework={}))
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
