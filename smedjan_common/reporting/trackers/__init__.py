"""Trackers: programs of others that show the figures of a run. metrics.jsonl stays the truth; a tracker gets the same rows.

Each is a row of TRACKERS and a file with a class that imports its package when the run starts. A class is used by one thread (thread.py),
so it may be slow, and what it raises is told once. All of them write into the run folder unless the environment names a server.
"""

import importlib
import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from smedjan_common.errors import ConfigError, unknown
from smedjan_common.files.atomic_file import write_atomically
from smedjan_common.files.names import TRACKERS as FOLDER
from smedjan_common.reporting.metrics import Row


class Start(NamedTuple):
    """What a tracker begins with. run_id: the same whenever the run goes on. folder: of the run. place: for the tracker's own files.
    step: the run goes on after it; what was logged of later steps no longer counts. config: as config.json."""

    run_id: str
    folder: Path
    place: Path
    step: int
    config: dict[str, Any]


class Tracker(Protocol):
    """The protocol. Every method may raise anything."""

    def start(self, start: Start) -> None:
        """Begin, or go on with, the run."""
        ...

    def log(self, step: int, figures: dict[str, float]) -> None:
        """The figures of a step."""
        ...

    def text(self, step: int, text: str) -> None:
        """A sample."""
        ...

    def finish(self, exit_code: int) -> None:
        """The run ended."""
        ...


class Known(NamedTuple):
    """package: what must be there to import it. where: what shows its files."""

    package: str
    install: str
    where: str


TRACKERS = {
    "tensorboard": Known("tensorboardX", "pip install 'smedjan[trackers]'", "tensorboard --logdir {place}"),
    "wandb": Known("wandb", "pip install wandb", "wandb sync {place}/wandb/offline-run-*"),
    "trackio": Known("trackio", "pip install trackio", "TRACKIO_DIR={place} trackio show"),
    "mlflow": Known("mlflow", "pip install mlflow", "mlflow ui --backend-store-uri sqlite:///{place}/mlflow.db"),
}
NONE = "none"


def check_trackers(names: Iterable[str]) -> None:
    """Raises ConfigError for a name that is unknown, or whose package is not installed. Imports none."""
    for name in names:
        if name not in (*TRACKERS, NONE):
            raise unknown("--tracker", name, [*TRACKERS, NONE])
        if name != NONE and importlib.util.find_spec(TRACKERS[name].package) is None:
            raise ConfigError(
                f"The tracker {name} is not installed.",
                f"It is the package {TRACKERS[name].package}.",
                f"Install it: {TRACKERS[name].install}.",
            )


def make_tracker(name: str) -> Tracker:
    """A tracker by its name; imports its package."""
    return importlib.import_module(f"{__name__}.{name}_tracker").Tracker()


def start_of(name: str, folder: Path, step: int, config: dict[str, Any], replay: bool = False) -> Start:
    """What the tracker of that name begins with, its place made, and the run's id written where it has none. Raises OSError.

    replay: it gets everything again, as a run of its own: what it has of this run would be there twice.
    """
    home = folder / FOLDER
    place = home / name
    place.mkdir(parents=True, exist_ok=True)
    file = home / "run_id"
    new = f"{folder.resolve().name}-{os.urandom(4).hex()}"
    if not replay and not file.exists():
        write_atomically(file, f"{new}\n".encode())
    return Start(new if replay else file.read_text().strip(), folder.resolve(), place.resolve(), step, config)


def figures(row: Row) -> dict[str, float]:
    """A row of metrics.jsonl under the names that trackers group by; what is not known is left out."""
    return {name: float(row[key]) for key, name in _NAMES.items() if row.get(key) is not None}


_NAMES = {
    "loss": "train/loss",
    "batch_loss": "train/batch_loss",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "tokens": "train/tokens",
    "balance_loss": "train/balance_loss",
    "router_z_loss": "train/router_z_loss",
    "val_loss": "validation/loss",
    "val_bits_per_byte": "validation/bits_per_byte",
    "tokens_per_second": "speed/tokens_per_second",
    "mfu": "speed/mfu",
    "elapsed_seconds": "speed/elapsed_seconds",
    "peak_memory_bytes": "memory/peak_bytes",
}
