"""What a machine has left, from the files and programs that say so: Linux with and without control groups, macOS."""

import resource
import sys

import pytest

from smedjan_common import machine
from smedjan_common.config import ModelConfig, TrainConfig
from tests.conformance import subjects

GIB = 1 << 30


@pytest.fixture
def linux(monkeypatch, tmp_path):
    """A Linux machine with 20 GiB available; returns a function that writes its files."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "CGROUP", tmp_path / "cgroup")

    def write(path: str, text: str | int) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"{text}\n")

    write("proc/meminfo", f"MemTotal: {24 << 20} kB\nMemFree: 1 kB\nMemAvailable:   {20 << 20} kB")
    return write


def test_a_machine_without_control_groups_has_what_its_kernel_says(linux):
    assert machine.available_memory() == 20 * GIB


def test_a_container_has_what_its_limit_leaves_and_cached_files_make_room(linux):
    linux("proc/self/cgroup", "0::/")
    linux("cgroup/memory.max", 8 * GIB)
    linux("cgroup/memory.current", 5 * GIB)
    linux("cgroup/memory.stat", f"anon 5\ninactive_file {GIB}")
    assert machine.available_memory() == 4 * GIB


def test_the_limit_of_a_group_above_holds_too(linux):
    linux("proc/self/cgroup", "0::/user.slice/run.scope")
    linux("cgroup/user.slice/run.scope/memory.max", "max")
    linux("cgroup/user.slice/run.scope/memory.current", GIB)
    linux("cgroup/user.slice/memory.max", 3 * GIB)
    linux("cgroup/user.slice/memory.current", GIB)
    assert machine.available_memory() == 2 * GIB


def test_groups_of_the_first_version_count_as_well(linux):
    linux("proc/self/cgroup", "9:cpu:/\n4:hugetlb,memory:/docker/abc")  # seen from inside, the container's group is the root
    linux("cgroup/memory/memory.limit_in_bytes", 6 * GIB)
    linux("cgroup/memory/memory.usage_in_bytes", 7 * GIB)
    linux("cgroup/memory/memory.stat", f"total_inactive_file {2 * GIB}")
    assert machine.available_memory() == GIB


def test_a_full_group_leaves_nothing_and_not_less(linux):
    linux("proc/self/cgroup", "0::/")
    linux("cgroup/memory.max", GIB)
    linux("cgroup/memory.current", 2 * GIB)
    assert machine.available_memory() == 0


VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               100000.
Pages active:                             200000.
Pages inactive:                            50000.
Pages speculative:                         10000.
Pages wired down:                         150000.
Pages purgeable:                            5000.
"Translation faults":                 1234567890.
"""


def test_a_mac_has_the_pages_that_are_free_or_made_so_at_once(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(machine, "_output", lambda *command: VM_STAT if command == ("vm_stat",) else "")
    assert machine.available_memory() == 165000 * 16384
    monkeypatch.setattr(machine, "_output", lambda *command: f"{16 * GIB}\n" if command[0] == "sysctl" else "")
    assert machine.available_memory() == 16 * GIB
    monkeypatch.setattr(machine, "_output", lambda *command: "")
    assert machine.available_memory() is None


def test_this_machine_says_what_it_has():
    assert 1 << 26 < machine.available_memory() < 1 << 50


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_the_peak_of_the_process_is_in_bytes(monkeypatch, platform: str, unit: int):
    monkeypatch.setattr(sys, "platform", platform)
    assert machine.peak_memory() == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit > 1 << 13


@pytest.mark.parametrize("backend", ["jax", "mlx"])
def test_the_peak_of_a_backend_on_a_cpu_is_the_process_own(backend: str):
    pytest.importorskip({"jax": "jax", "mlx": "mlx.core"}[backend])
    made = subjects.module(backend, "backend")
    made = (made.JaxBackend if backend == "jax" else made.MlxBackend)(ModelConfig.preset("tiny"), TrainConfig(1, 1, 8, 1e-3))
    if made.describe().kind != "cpu":
        pytest.skip("a GPU counts its own")
    assert 1 << 20 < made.peak_memory() <= machine.peak_memory()
