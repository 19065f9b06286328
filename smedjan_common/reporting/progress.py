"""Progress of long work over bytes or steps: a bar with speed and time left on a terminal, silence elsewhere."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from smedjan_common.streams import is_live


@contextlib.contextmanager
def progress_bar(unit: str = "bytes") -> Iterator[Callable[[str, int, int], None]]:
    """Gives `show(stage, done, total)`; each stage has its own bar. `unit`: "bytes" shows MB/s. Standard error only."""
    if not is_live(sys.stderr):
        yield lambda stage, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    start = [TextColumn("{task.description:>10}"), BarColumn()]
    bars = {
        "bytes": Progress(*start, DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), console=console),
        "steps": Progress(*start, MofNCompleteColumn(), TimeRemainingColumn(), console=console),
    }
    tasks: dict[str, int] = {}
    running = None

    def show(stage: str, done: int, total: int) -> None:
        nonlocal running
        bar = bars[unit if stage != "merge" else "steps"]
        if stage not in tasks:
            if running is not None:
                running.stop()
            running = bar
            bar.start()
            tasks[stage] = bar.add_task(stage, total=total)
        bar.update(tasks[stage], completed=done)  # type: ignore[arg-type]

    try:
        yield show
    finally:
        if running is not None:
            running.stop()
