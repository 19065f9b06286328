"""Runs in numbers, from their config.json and metrics.jsonl alone: a summary of each, and the table of several."""

import statistics
from pathlib import Path
from typing import Any

from smedjan_common.errors import ConfigError
from smedjan_common.files.names import FINAL
from smedjan_common.model.config import ModelConfig
from smedjan_common.model.flops import train_flops_per_token
from smedjan_common.reporting.console import count
from smedjan_common.reporting.metrics import eval_rows, read_rows, train_rows
from smedjan_common.run.claim import is_run
from smedjan_common.run.folder import read_config
from smedjan_common.training.config import TrainConfig

Summary = dict[str, Any]
_HEAD = ("run", "", "step", "tokens", "loss", "best validation", "at step", "bits/byte", "parameters", "mixer", "tok/s")


def runs_in(folder: Path) -> list[Path]:
    """The run folders directly in `folder`, by name. Raises OSError."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".") and is_run(path))


def summary(path: Path) -> Summary:
    """Where a run is and what it has reached; null is what its files do not say. tokens_per_second: the median of its rows."""
    rows, config = read_rows(path), read_config(path) or {}
    trained, checks = train_rows(rows), eval_rows(rows)
    last: Summary = trained[-1] if trained else {}
    best: Summary = min(checks, key=lambda row: row["val_loss"], default={})
    speeds = [row["tokens_per_second"] for row in trained if row.get("tokens_per_second")]
    step, steps = max((row["step"] for row in rows), default=0), _steps(config)
    model = _model(config)
    return {
        "run": str(path),
        "finished": (path / FINAL).is_dir() and steps is not None and step >= steps,
        "step": step,
        "steps": steps,
        "tokens": last.get("tokens"),
        "loss": last.get("loss"),
        "best_val_loss": best.get("val_loss"),
        "best_val_step": best.get("step"),
        "best_val_bits_per_byte": best.get("val_bits_per_byte"),
        "parameters": model.num_params() if model else None,
        "mixer": list(model.mixer) if model else None,
        "tokens_per_second": statistics.median(speeds) if speeds else None,
    }


def flops_per_token(path: Path) -> float | None:
    """Of training the run's model, forward and backward; None where config.json does not say it."""
    config = read_config(path) or {}
    model, train = _model(config), config.get("train")
    if not model or not isinstance(train, dict) or "seq_len" not in train:
        return None
    try:
        adapters = TrainConfig.from_dict(train).adapters
    except ConfigError:
        adapters = None
    return train_flops_per_token(model, train["seq_len"], adapters=adapters)


def _steps(config: Summary) -> int | None:
    train = config.get("train")
    return train.get("steps") if isinstance(train, dict) else None


def _model(config: Summary) -> ModelConfig | None:
    """None for a run whose config.json is gone or names no model that can be: the other runs are shown all the same."""
    try:
        return ModelConfig.from_dict(config["model"])
    except (KeyError, ConfigError):
        return None


def table(summaries: list[Summary]) -> str:
    """Aligned text, a line for each run; words to the left, numbers to the right."""
    lines = [_HEAD, *map(_cells, summaries)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
    words = (_HEAD.index("run"), _HEAD.index(""), _HEAD.index("mixer"))
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _cells(run: Summary) -> tuple[str, ...]:
    def shown(name: str, form: str = "") -> str:
        return "-" if run[name] is None else format(run[name], form) if form else count(run[name])

    return (
        run["run"],
        "finished" if run["finished"] else "unfinished",
        f"{run['step']}/{'-' if run['steps'] is None else run['steps']}",
        shown("tokens"),
        shown("loss", ".4f"),
        shown("best_val_loss", ".4f"),
        shown("best_val_step", "d"),
        shown("best_val_bits_per_byte", ".4f"),
        shown("parameters"),
        ",".join(run["mixer"] or ["-"]),
        shown("tokens_per_second"),
    )
