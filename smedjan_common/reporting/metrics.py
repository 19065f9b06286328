"""metrics.jsonl: one JSON object a line, flushed; what is not known is null.

    {"step", "tokens", "loss", "batch_loss", "lr", "grad_norm", "tokens_per_second", "mfu", "peak_memory_bytes", "elapsed_seconds"}
    and of a model with experts {"balance_loss", "router_z_loss", "expert_load"}
    {"step", "val_loss", "val_bits_per_byte"}                                     evaluations, on lines of their own
    {"step", "event": "resumed", "backend", "before"}                             from this step on in that backend, before it in the other

`step` counts optimizer steps done. `loss` is the mean over the steps since the row before, `batch_loss` that of the step alone (rows of
earlier versions lack it: their loss is that of the step). A resumed run drops the rows past its checkpoint, so that every logged step
stands once.
"""

import json
from pathlib import Path
from typing import Any

from smedjan_common.files.atomic_file import write_atomically
from smedjan_common.files.names import METRICS
from smedjan_common.files.regular import read_regular

TRAIN_KEYS = ("step", "tokens", "loss", "batch_loss", "lr", "grad_norm", "tokens_per_second", "mfu", "peak_memory_bytes", "elapsed_seconds")
EVAL_KEYS = ("step", "val_loss", "val_bits_per_byte")
Row = dict[str, Any]
_MOST = 1e300  # what is drawn and counted is a float


def read_rows(folder: str | Path) -> list[Row]:
    """The rows of a run folder; none when there is no file. A line that is not whole JSON (a killed run's
    last) or has no row's figures is left out."""
    try:
        lines = read_regular(Path(folder) / METRICS).decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return []
    return [row for line in lines if (row := _parse(line)) is not None]


def train_rows(rows: list[Row]) -> list[Row]:
    """The rows of training steps."""
    return [row for row in rows if row.get("loss") is not None]


def eval_rows(rows: list[Row]) -> list[Row]:
    """The rows of evaluations."""
    return [row for row in rows if row.get("val_loss") is not None]


def event_rows(rows: list[Row]) -> list[Row]:
    """The rows of what happened to the run."""
    return [row for row in rows if isinstance(row.get("event"), str)]


def resumed(step: int, backend: str, before: str | None) -> Row:
    """The row of a run that goes on after `step`; before: the backend up to there."""
    return {"step": step, "event": "resumed", "backend": backend, "before": before}


def routing(values: dict[str, Any]) -> Row:
    """What a step of a model with experts adds to its row: the losses of its routers, null where the router has none, and
    each expert's share of the tokens of its layer, [layers, experts]. Nothing of a dense model."""
    if "expert_load" not in values:
        return {}
    losses = {name: values.get(name) for name in ("balance_loss", "router_z_loss")}
    return {**losses, "expert_load": [[round(share, 5) for share in layer] for layer in values["expert_load"]]}


class MetricsFile:
    """Appends rows to `folder/metrics.jsonl`; first drops the rows past `step`, and a torn last line. writes: False where another
    process does that, and this one keeps the rows."""

    def __init__(self, folder: Path, step: int, rows: list[Row] | None = None, writes: bool = True):
        self.path = folder / METRICS
        known = read_rows(folder) if rows is None else rows
        self.rows = [row for row in known if row["step"] < step + (row.get("event") is None)]  # that it went on from here is told anew
        self._file = None
        if not writes:
            return
        write_atomically(self.path, "".join(_line(row) for row in self.rows).encode())
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, row: Row) -> None:
        """Append one row; it is in the file when this returns."""
        self.rows.append(row)
        if self._file:
            self._file.write(_line(row))
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()


def _parse(line: str) -> Row | None:
    try:
        row = json.loads(line)
        _line(row)  # which it must be when the run goes on: NaN is no JSON
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or (row.get("loss") is not None and row.get("tokens") is None):
        return None
    return row if all(_is_figure(row.get(key)) for key in {*TRAIN_KEYS, *EVAL_KEYS}) else None


def _is_figure(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and abs(value) < _MOST)


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
