"""Work in processes: results in order, refusals of a process as they are here, and no process that ends unseen."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from smedjan_common import workers
from smedjan_common.errors import ConfigError, DataError, OutOfMemoryError, WorkerError
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.workers import Workers

TEXT = "the smith and the hammer, the iron and the fire\n" * 50_000
HAND = "tests.fakes.worker:Hand"

GROUPED = """
import pytest

@pytest.mark.xdist_group("one-worker")
def test_of_a_group(request):
    assert request.node.nodeid.endswith("@one-worker")
"""


def test_tests_of_a_group_go_to_one_worker(tmp_path):
    """pytest-xdist 3.8 reads the group from the name, which pytest 9.2 does not let it change: every worker compiled every case."""
    (tmp_path / "test_grouped.py").write_text(GROUPED)
    ini = [f"--rootdir={tmp_path}", "-c", os.devnull]
    plugins = ["-p", "no:cacheprovider", "-p", "xdist.plugin"]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, "-n", "1", "--dist", "loadgroup", *ini, "test_grouped.py"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    alone |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # the others take seconds
    ended = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout


def test_results_come_in_order_and_a_refusal_is_the_same_as_here():
    with Workers(HAND, (), 2) as pool:
        assert list(pool.map(range(20))) == [2 * number for number in range(20)]
        with pytest.raises(DataError, match=r"No\. It is so\. Ask another\."):
            list(pool.map([1, "refuse"]))


@pytest.mark.parametrize(
    ("item", "says"), [(signal.SIGKILL, "SIGKILL.*memory"), (signal.SIGSEGV, "SIGSEGV"), (signal.SIGTERM, "SIGTERM"), ("leave", "code 7")]
)
def test_a_process_that_ends_early_is_named_by_its_signal_or_code(item, says):
    with Workers(HAND, (), 2) as pool, pytest.raises(WorkerError, match=says) as caught:
        list(pool.map([1, 2, item, *range(10)]))
    assert caught.value.exit_code == 3
    assert "--workers" in caught.value.fix


def test_a_process_that_ends_while_it_waits_or_hands_in_is_told_too():
    with Workers(HAND, (), 2) as pool:
        for process in pool._processes:
            process.kill()
            process.wait()
        with pytest.raises(WorkerError, match="SIGKILL"):
            list(pool.map([np.ones(1 << 17)]))
        with pytest.raises(WorkerError, match="SIGKILL"):
            pool.finish()
    with Workers(HAND, (), 2) as pool, pytest.raises(WorkerError, match="SIGSEGV"):
        pool.finish()


def test_memory_that_a_process_cannot_have_is_out_of_memory():
    with Workers(HAND, (), 2) as pool, pytest.raises(OutOfMemoryError, match=r"Unable to allocate.*--workers"):
        list(pool.map(["allocate"]))


def test_a_number_of_processes_that_is_given_is_the_number():
    assert [workers.processes(asked, 10) for asked in (1, 3, None)] == [1, 3, 1]
    assert workers.processes(None, 1 << 30) == workers.default_workers()
    for asked in (0, -1):
        with pytest.raises(ConfigError, match=f"--workers is {asked}"):
            workers.processes(asked, 10)


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    rows = [line.split() for line in subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True).stdout.splitlines()]
    return [int(child) for child, parent in rows if int(parent) == pid]


def kill_children(process: subprocess.Popen, count: int) -> None:
    """Kill them as soon as there are so many."""
    found = []
    while process.poll() is None and len(found) < count:
        found = children(process.pid)
    for child in found:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("command", ["tokenizer", "prepare", "dedup", "process"])
def test_a_command_whose_processes_are_killed_says_so_and_writes_nothing(tmp_path, command):
    (tmp_path / "text.txt").write_text(TEXT)
    Tokenizer.train_from_texts([TEXT[:10_000]], 270).save(tmp_path / "tokenizer.json")
    output = {"tokenizer": "new.json", "prepare": "new.bin"}.get(command, "new.jsonl")
    arguments = [command, "--input", "text.txt", "--output", output, "--workers", "3"]
    start = f"import sys; from smedjan_common.cli import main; sys.exit(main({arguments!r}))"
    running = subprocess.Popen([sys.executable, "-c", start], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    kill_children(running, 3)  # long before they have read their libraries
    out, err = running.communicate(timeout=30)
    assert (running.returncode, out) == (3, "")
    assert "ended by SIGKILL" in err
    assert "Traceback" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt", "tokenizer.json"]
