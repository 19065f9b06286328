"""What the measuring programs share: a result file that is whole after every row, rows in processes of their own, a time limit.

A result file is {"command", "date", "python", "device", "versions", "sources", "rows": [...]}. A program that is started again on
the same sources, versions and device keeps the rows that it has and measures what is missing, so a time limit costs nothing.
"""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from smedjan_common.files.atomic_file import write_atomically

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "mlx", "numpy")

Row = dict[str, Any]


class Results:
    """The rows of one program on one device. `key`: the fields that tell rows apart."""

    def __init__(self, output: pathlib.Path, key: Iterable[str], **settings: Any):
        self.output, self.key = output, tuple(key)
        made = {"python": platform.python_version(), "device": device_name(), "versions": versions(), "sources": sources(), **settings}
        self.about = {"command": command(), "date": time.strftime("%Y-%m-%d", time.gmtime()), **made}
        before = json.loads(output.read_text()) if output.exists() else {}
        same = all(before.get(name) == value for name, value in made.items())
        self.rows: list[Row] = [row for row in before.get("rows", []) if same and "error" not in row]

    def has(self, row: Row) -> bool:
        """Whether a row with this key was measured."""
        return any(self._identity(row) == self._identity(done) for done in self.rows)

    def add(self, row: Row) -> None:
        """Append a row, write the file and print the row."""
        self.rows.append(row)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.output, (json.dumps({**self.about, "rows": self.rows}, indent=1) + "\n").encode())
        print(json.dumps(row), flush=True)

    def _identity(self, row: Row) -> tuple:
        return tuple(json.dumps(row.get(name)) for name in self.key)


def in_processes(
    module: str,
    tasks: list[Row],
    done: Callable[[Row, list[Row]], None],
    jobs: int = 1,
    seconds: float = 600,
    env: dict[str, str] | None = None,
) -> None:
    """Run `python -m MODULE --task JSON` for each task, `jobs` at a time, for at most `seconds`; `done(task, rows)` gets what it printed.

    A row of a process is a line of its output that is a JSON object, so a process that dies keeps those that it printed. Its end is
    then one more row with "error". Tasks that no time is left for are told and left out.
    """
    deadline = time.monotonic() + seconds

    def run(task: Row) -> list[Row] | None:
        left = deadline - time.monotonic()
        return None if left <= 0 else _process(module, task, left, env or {})

    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(run, task): task for task in tasks}
        for future in as_completed(running):
            rows = future.result()
            if rows is None:
                print(f"no time left for {json.dumps(running[future])}", flush=True)
            else:
                done(running[future], rows)


def _process(module: str, task: Row, seconds: float, env: dict[str, str]) -> list[Row]:
    """The rows that one process printed, and its error if it had one."""
    arguments = [sys.executable, "-m", module, "--task", json.dumps(task)]
    process = subprocess.Popen(
        arguments, cwd=ROOT, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=seconds)
        error = "" if process.returncode == 0 else ([f"exit {process.returncode}", *err.strip().splitlines()][-1])
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        error = "the time limit"
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return [*rows, {**task, "error": scrubbed(error)}] if error else rows


def scrubbed(text: str) -> str:
    """An error's text without the paths of this machine, 200 characters of it."""
    return re.sub(r"(?<![\w.-])/[\w./-]+/", "", text)[:200]


def command() -> str:
    """The command line as a user of the repository would give it."""
    return scrubbed(" ".join(["python -m", f"bench.{pathlib.Path(sys.argv[0]).stem}", *sys.argv[1:]]))


def device_name() -> str:
    """The accelerator's name, or cpu. Asks the driver: a framework would take the device."""
    if os.environ.get("JAX_PLATFORMS", "") == "cpu" or not shutil.which("nvidia-smi"):
        return "cpu"
    asked = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=False)
    return asked.stdout.splitlines()[0].strip() if asked.returncode == 0 and asked.stdout.strip() else "cpu"


def slug(device: str) -> str:
    """`cpu`, `h100`, or the whole name in small letters."""
    known = re.search(r"\b[ABHL]\d{1,3}S?\b", device)
    return known[0].lower() if known else re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def default_output(name: str) -> pathlib.Path:
    """bench/results/NAME-DEVICE.json."""
    return RESULTS / f"{name}-{slug(device_name())}.json"


def versions() -> dict[str, str]:
    """What is installed of the frameworks."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def sources(*others: str) -> str:
    """A hash of what is measured: the Python files of the packages, and of `others`."""
    total = hashlib.sha256()
    for path in sorted(
        path for folder in ("smedjan_common", "smedjan_jax", "smedjan_mlx", *others) for path in (ROOT / folder).rglob("*.py")
    ):
        total.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]
