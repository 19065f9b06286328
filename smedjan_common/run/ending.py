"""What a run says when it ends: what it has reached, where its time went, where things are, and what to do next."""

import statistics
from pathlib import Path

from smedjan_common.files.names import FINAL, METRICS, PLOT, SAMPLES
from smedjan_common.reporting.console import count, lasted, size
from smedjan_common.reporting.metrics import Row, eval_rows, train_rows
from smedjan_common.reporting.pace import Pace
from smedjan_common.reporting.table import as_table


def ending(folder: Path, rows: list[Row], pace: Pace, seconds: float, finished: bool) -> str:
    """The lines after the one that says why it ended. rows: all of metrics.jsonl. seconds: of this start of the run."""
    lines = [*_reached(rows), ("time", _times(pace, seconds))]
    if finished:
        lines += [
            ("files", f"{folder}: {_files(folder)}"),
            ("next", f"smedjan chat {folder}"),
            ("", f'smedjan generate {folder} --prompt "Once"'),
        ]
    return as_table(lines)


def _reached(rows: list[Row]) -> list[tuple[str, str]]:
    trained, checks, lines = train_rows(rows), eval_rows(rows), []
    if trained:
        lines.append(
            ("loss", f"{trained[0]['loss']:.4f} -> {trained[-1]['loss']:.4f} (steps {trained[0]['step']} and {trained[-1]['step']})")
        )
    if checks:
        best, last = min(checks, key=lambda row: row["val_loss"]), checks[-1]
        end = "" if best is last else f"; at the end {last['val_loss']:.4f}"
        bits = "" if best.get("val_bits_per_byte") is None else f", {best['val_bits_per_byte']:.4f} bits per byte"
        lines.append(("validation", f"{best['val_loss']:.4f} at step {best['step']}{bits}{end}"))
    if trained:
        speeds = [row["tokens_per_second"] for row in trained if row.get("tokens_per_second")]
        peak = trained[-1].get("peak_memory_bytes")
        known = (f"{count(statistics.median(speeds))} tok/s" if speeds else "", f"peak memory {size(peak)}" if peak else "")
        lines.append(("tokens", ", ".join(filter(None, (count(trained[-1]["tokens"]), *known)))))
    return lines


def _times(pace: Pace, seconds: float) -> str:
    parts = {"training": seconds - sum(pace.spent.values()), **pace.spent}
    return ", ".join(f"{what} {lasted(max(0.0, spent))}" for what, spent in parts.items())


def _files(folder: Path) -> str:
    kinds = [name for name in ("step-*/", "orbax-*/") if any(folder.glob(name))]
    there = [name for name in (PLOT, SAMPLES) if (folder / name).exists()]
    return ", ".join((f"{FINAL}/ (the model)", *(f"{kind} (checkpoints)" for kind in kinds), METRICS, *there))
