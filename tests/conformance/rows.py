"""Stored loss rows: a refactoring leaves them bit-identical. `python -m tests.conformance.rows` writes them anew.

What may honestly be demanded: the bits of a float32 run belong to one build of one framework on one kind of CPU. XLA and
BLAS pick their instructions, and with them the order of sums, by the CPU's features, and both change between releases. So a row
carries the versions, the CPU and the BLAS it was made with; equality is exact where all of these are the same, and within the 20-step gate
anywhere else. Threads do not count: the suite runs on one (tests/conftest.py). Other versions' rows are refreshed by
whoever changes the pins, in the commit that changes them; a diff of a row without such a change is a change of numerics.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
from collections.abc import Callable

import tests.conftest  # settings first, also when this is run as a script
from smedjan_common.training.schedule import learning_rate
from tests.conformance import subjects
from tests.conformance.cases import CASES, SEED, Case

FOLDER = pathlib.Path(__file__).parent / "rows"
PACKAGES = {"jax": ("jax", "jaxlib", "optax", "numpy"), "mlx": ("mlx", "numpy")}

__all__ = ["FOLDER", "SEED", "learning_rate", "made_with", "path", "run", "write_losses"]


@functools.cache
def _run(backend: str, key: str) -> subjects.Run:
    case = CASES[key]
    return subjects.train(backend, case.model, case.train, case.start, case.batches)


def run(backend: str, case: Case) -> subjects.Run:
    """The 20-step run of a combination from its plain initial values; once per session."""
    return _run(backend, case.id)


def path(case: Case) -> pathlib.Path:
    """The file of a combination's rows."""
    return FOLDER / f"{case.id}.json"


@functools.cache
def made_with(backend: str) -> dict[str, str]:
    """What the bits of a run depend on."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES[backend]}
    blas = {"blas": _blas()} if backend == "mlx" else {}
    return {"device": tests.conftest.DEVICE, "cpu": _cpu(), **blas, **versions}


def _cpu() -> str:
    """Family and model, with a hash of the instruction sets: what code generators look at."""
    file = pathlib.Path("/proc/cpuinfo")
    if not file.exists():
        return f"{platform.machine()} {platform.processor()}"
    pairs = (line.partition(":") for line in file.read_text().split("\n\n")[0].splitlines())
    facts = {key.strip(): value.strip() for key, _, value in pairs}
    features = hashlib.sha256(" ".join(sorted(facts.get("flags", "").split())).encode()).hexdigest()[:12]
    return f"{facts.get('vendor_id')} family {facts.get('cpu family')} model {facts.get('model')} features {features}"


def _blas() -> str:
    """A preloaded BLAS by its name, or what MLX brings. (What else this process has loaded, torch's say, is not asked.)"""
    preloaded = os.environ.get("LD_PRELOAD", "").replace(":", " ").split()
    return ", ".join(sorted(pathlib.Path(name).name for name in preloaded if "blas" in name)) or "bundled"


def write_losses(file: pathlib.Path, losses: Callable[[str], object]) -> int:
    """Write what `losses` gives for the backends that are installed, or are named on the command line, keeping the others'."""
    file.parent.mkdir(exist_ok=True)
    known = json.loads(file.read_text()) if file.exists() else {}
    for backend in sys.argv[1:] or subjects.BACKENDS:
        known[backend] = {"made_with": made_with(backend), "loss": losses(backend)}
    file.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    return 0


def main() -> int:
    """Write the rows of the backends that are installed, keeping the others'."""
    FOLDER.mkdir(exist_ok=True)
    for case in CASES.values():
        rows = json.loads(path(case).read_text()) if path(case).exists() else {}
        for backend in sys.argv[1:] or subjects.BACKENDS:
            result = run(backend, case)
            rows[backend] = {"made_with": made_with(backend), "loss": result.losses, "grad_norm": result.grad_norms}
        path(case).write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
        print(path(case).name)
    for stale in set(FOLDER.glob("*.json")) - {path(case) for case in CASES.values()}:
        stale.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
