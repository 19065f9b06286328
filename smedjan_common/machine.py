"""What this machine has: memory that a process can still take, and the most that this one ever took. Linux and macOS.

Available is what the kernel would give without swapping: MemAvailable on Linux, within the limits of the process's control groups
(v2: memory.max, v1: memory.limit_in_bytes; a container has them); free, inactive, speculative and purgeable pages on macOS.
"""

import hashlib
import platform
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def available_memory() -> int | None:
    """Bytes that this process can still take; None where it is not known."""
    found = _macos() if sys.platform == "darwin" else min((value for value in (_linux(), *_cgroups()) if value is not None), default=None)
    return None if found is None else max(0, found)


def peak_memory() -> int:
    """The most bytes of memory that this process ever held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10  # bytes there, KiB on Linux


def processor() -> str:
    """A short name of what the processor can do: the same where the same compiled code runs."""
    lines = _text(PROC / "cpuinfo").splitlines()
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "") or _output(
        "sysctl", "-n", "machdep.cpu.brand_string"
    )
    return hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()[:8]


def _linux() -> int | None:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text(PROC / "meminfo"), re.MULTILINE)
    return int(found[1]) << 10 if found else None


def _cgroups() -> Iterator[int]:
    """What the limit of each control group leaves, from the process's own up to the root; cached files make room when it is wanted."""
    for line in _text(PROC / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, usage, cached = CGROUP, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage, cached = CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        own = root / path.lstrip("/")
        for folder in (own, *own.parents):
            most, used = _text(folder / limit).strip(), _text(folder / usage).strip()
            if most.isdecimal() and used.isdecimal():
                freed = re.search(rf"^{cached} (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
                yield int(most) - int(used) + (int(freed[1]) if freed else 0)
            if folder == root:
                break


def _macos() -> int | None:
    """Pages that are free or can be made so at once, by vm_stat; a part of it that is missing counts nothing."""
    text = _output("vm_stat")
    size = re.search(r"page size of (\d+) bytes", text)
    pages = re.findall(r"^Pages (?:free|inactive|speculative|purgeable):\s+(\d+)\.", text, re.MULTILINE)
    if size and pages:
        return int(size[1]) * sum(map(int, pages))
    whole = _output("sysctl", "-n", "hw.memsize").strip()
    return int(whole) if whole.isdecimal() else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
