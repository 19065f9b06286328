"""Real runs of both backends that are killed at random moments, again and again: nothing that stood is lost, and the end is the same.

`make soak` kills SMEDJAN_KILLS times (100) with the frameworks and as often without one, where a start takes no time; here it is a
handful. Every checkpoint is written in the background, Orbax ones too.
"""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smedjan_common.checkpoint import find_checkpoints, latest_checkpoint, read_checkpoint, verify_checkpoint
from smedjan_mlx.openblas import OFF
from tests.conformance.compare import demand_equal_bits
from tests.fakes.runs import ROOT, TEXT, figures

SUBJECTS = {
    "jax": ("smedjan_jax",),
    "jax, orbax": ("smedjan_jax", "--checkpoint-format", "orbax"),
    "mlx": ("smedjan_mlx",),
    "no framework": ("tests.fakes",),
}
DISKS = ("jax, orbax", "no framework")  # what writes: Orbax, and the neutral writer that both backends share
ALL = int(os.environ.get("SMEDJAN_KILLS", "3"))
KILLS = dict.fromkeys(SUBJECTS, -(-ALL // 3)) | {"no framework": ALL}
FLAGS = (
    *"--size custom --dim 16 --layers 1 --heads 2 --ffn-mult 1 --vocab-size 300 --batch-size 4 --seq-len 16 --eval-every 0".split(),
    *"--lr-schedule constant --warmup 3 --lr 0.003 --log-every 1 --keep 3 --keep-every 40 --sample-every 0".split(),
)
OFTEN = ("--checkpoint-every", "4")
ENDLESS = (*OFTEN, "--steps", "1000000")
pytestmark = pytest.mark.timeout(max(600, 60 * ALL))


def start(subject: str, folder: Path, *flags: str, **options) -> subprocess.Popen:
    """Start or go on with the run in `folder`."""
    package, *more = SUBJECTS[subject]
    words = ["--dataset", str(folder / "text.txt"), "--checkpoint-dir", str(folder / "run"), *FLAGS, *more, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT, "env": os.environ | {OFF: "1"}}
    return subprocess.Popen([sys.executable, "-u", "-m", f"{package}.train", *words], **pipes | options)


def finish(subject: str, folder: Path, steps: int, often: tuple[str, ...] = OFTEN) -> None:
    """Train to the end, which must be well."""
    process = start(subject, folder, *often, "--steps", str(steps))
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output


def killed(process: subprocess.Popen, run: Path, rng: random.Random) -> str:
    """Kill it at a random moment: while it starts, while it trains, after a checkpoint, or in the midst of one. Returns what it printed."""
    lines = []
    assert process.stdout
    moment = rng.choice(("start", "step", "saved", "write"))
    if moment in ("step", "saved"):
        while (line := process.stdout.readline()) and not line.startswith(f"{moment} "):
            lines.append(line)
        lines.append(line)
    if moment == "write":
        before, deadline = unfinished(run), time.monotonic() + 120
        while unfinished(run) <= before and time.monotonic() < deadline:
            time.sleep(0.001)
    time.sleep(rng.random() * {"start": 3, "write": 0.03}.get(moment, 0.5))
    process.send_signal(signal.SIGKILL)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, "".join(lines) + rest
    return "".join(lines) + rest


def unfinished(run: Path) -> set[str]:
    """Temporary directories of writers, living or dead."""
    return {path.name for path in run.glob(".tmp-*")}


def check(run: Path, output: str) -> None:
    """Everything that looks like a checkpoint is one, and none that was told is lost but to --keep."""
    broken: list[str] = []
    found = find_checkpoints(run, on_skip=broken.append)
    assert broken == []
    for _, path in found:
        verify_checkpoint(path)
    told = [Path(line.split()[1]) for line in output.splitlines() if line.startswith("saved ")]
    if told:
        assert found[-1].path.name.split("-")[1] >= told[-1].name.split("-")[1]
        assert latest_checkpoint(run) == found[-1].path


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_not(tmp_path, subject):
    rng = random.Random(f"{subject} {os.environ.get('SMEDJAN_SEED', '0')}")
    folder, whole, torn = tmp_path / "killed", tmp_path / "whole", 0
    for place in (folder, whole):
        place.mkdir()
        (place / "text.txt").write_text(TEXT)
    for _ in range(KILLS[subject]):
        output = killed(start(subject, folder, *ENDLESS), folder / "run", rng)
        if (folder / "run").is_dir():
            check(folder / "run", output)
            torn += bool(unfinished(folder / "run"))
    found = find_checkpoints(folder / "run") if (folder / "run").is_dir() else []
    steps = (found[-1].step if found else 0) + 3
    finish(subject, folder, steps)
    finish(subject, whole, steps, often=("--checkpoint-every", "0"))
    print(f"{subject}: {KILLS[subject]} kills, {torn} of them inside a write, {steps} steps")
    assert torn > 0 or KILLS[subject] < 10, "no kill fell into a write: the test proves nothing"
    a, b = (read_checkpoint(place / "run" / "final") for place in (folder, whole))
    assert (a.step, b.step) == (steps, steps)
    demand_equal_bits(a.snapshot.params, b.snapshot.params)
    assert figures(folder / "run") == figures(whole / "run"), "every step stands once, with the figures of the other run"


def wait_for_a_checkpoint(process: subprocess.Popen) -> None:
    assert process.stdout
    while not (line := process.stdout.readline()).startswith("saved "):
        assert line, "it ended before its first checkpoint"


def errors_and_goes_on(subject: str, folder: Path, process: subprocess.Popen, words: str, mend) -> None:
    """The process ends with exit 2 and these words, all checkpoints are whole, and when it is mended the run goes on."""
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert words in output
    assert "Older checkpoints are intact" in output
    assert "Traceback" not in output
    check(folder / "run", output)
    step = find_checkpoints(folder / "run")[-1].step
    mend()
    finish(subject, folder, step + 5)


@pytest.mark.parametrize("subject", DISKS)
def test_a_full_disk_is_an_error_and_the_run_goes_on_when_there_is_room(tmp_path, subject):
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small tmpfs can only be mounted by root outside a container; RLIMIT_FSIZE stands in for it in tests/unit")
    try:
        (tmp_path / "text.txt").write_text(TEXT)
        process = start(subject, tmp_path, *ENDLESS, "--keep", "0", "--force")  # it is refused beforehand otherwise
        errors_and_goes_on(subject, tmp_path, process, "No space left on device", lambda: make_room(tmp_path / "run"))
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def make_room(run: Path) -> None:
    for _, path in find_checkpoints(run)[:-1]:
        subprocess.run(["rm", "-r", str(path)], check=True)


@pytest.mark.parametrize("subject", DISKS)
def test_a_directory_that_may_not_be_written_any_more_is_an_error(tmp_path, subject):
    run = tmp_path / "run"
    shut, opened, words = ["chmod", "555"], ["chmod", "755"], "Permission denied"
    if os.geteuid() == 0:  # who may write anywhere but into what is immutable
        shut, opened, words = ["chattr", "+i"], ["chattr", "-i"], "Operation not permitted"
    (tmp_path / "text.txt").write_text(TEXT)
    process = start(subject, tmp_path, *ENDLESS)
    wait_for_a_checkpoint(process)
    try:
        if subprocess.run([*shut, str(run)], capture_output=True, check=False).returncode:
            process.kill()
            process.communicate()
            pytest.skip("root cannot shut a directory on this file system; tests/unit/test_checkpoint_disk.py stands in")
        errors_and_goes_on(subject, tmp_path, process, words, lambda: subprocess.run([*opened, str(run)], check=True))
    finally:
        subprocess.run([*opened, str(run)], capture_output=True, check=False)
