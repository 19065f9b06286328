"""What a run is doing, in a few lines of text: the loop writes a Status, a live display reads it from a thread of its own."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from smedjan_common.reporting.console import count, duration, size
from smedjan_common.reporting.metrics import Row

BAR = 40  # columns at most


@dataclass
class Status:
    """figures: the newest of each, by the keys of metrics.jsonl. doing: what it does instead of training ("compiling"), since when by
    perf_counter. left: seconds to the end, where that is known. notice: what a signal does."""

    folder: Path
    steps: int
    step: int = 0
    figures: Row = field(default_factory=dict)
    doing: str = ""
    since: float = 0.0
    left: float | None = None
    notice: str = ""

    def lines(self, width: int, full: str = "#", empty: str = "-") -> list[str]:
        """The display, at most `width` columns wide: the bar, the figures, and what a signal does."""
        now = f"{self.doing} … {duration(time.perf_counter() - self.since)}" if self.doing else ""
        left = f"left {duration(self.left)}" if self.left is not None else ""
        share = min(1.0, self.step / self.steps) if self.steps else 0.0
        head = "  ".join(filter(None, (f"{100 * share:3.0f} %", f"step {self.step}/{self.steps}", left, now)))
        columns = min(BAR, width - len(head) - 2)
        done = round(share * columns)
        bar = full * done + empty * (columns - done) + "  " if columns >= 8 else ""
        return [(bar + head)[:width], *_filled(self.cells(), width), *([self.notice[:width]] if self.notice else [])]

    def line(self) -> str:
        """All of it in one line, for who asks by a signal."""
        now = f"{self.doing} … {duration(time.perf_counter() - self.since)}" if self.doing else ""
        left = f"left {duration(self.left)}" if self.left is not None else ""
        return "  ".join(filter(None, (f"step {self.step}/{self.steps}", now, *self.cells(), left)))

    def cells(self) -> list[str]:
        """What is known, each with its name."""
        return [show(self.figures[key]) for key, show in _CELLS.items() if self.figures.get(key) is not None]


_CELLS = {
    "loss": lambda value: f"loss {value:.4f}",
    "val_loss": lambda value: f"validation {value:.4f}",
    "val_bits_per_byte": lambda value: f"bits/byte {value:.4f}",
    "lr": lambda value: f"lr {value:.2e}",
    "grad_norm": lambda value: f"grad {value:.2f}",
    "tokens_per_second": lambda value: f"{count(value)} tok/s",
    "mfu": lambda value: f"mfu {100 * value:.1f} %",
    "peak_memory_bytes": lambda value: f"memory {size(value)}",
}


def _filled(cells: list[str], width: int) -> list[str]:
    """The cells in as few lines as they need."""
    lines: list[str] = []
    for cell in cells:
        if lines and len(lines[-1]) + 2 + len(cell) <= width:
            lines[-1] += f"  {cell}"
        else:
            lines.append(cell[:width])
    return lines
