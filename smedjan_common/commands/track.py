"""`smedjan track RUN --to X`: the rows of a run, finished or running, into a tracker: for machines that have no network, and afterwards."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import arg

from smedjan_common.command_line import parse
from smedjan_common.errors import ConfigError, DataError, SmedjanError, run_command
from smedjan_common.files.names import SAMPLES
from smedjan_common.nearby import beside
from smedjan_common.reporting.metrics import read_rows
from smedjan_common.reporting.trackers import NONE, TRACKERS, Tracker, check_trackers, figures, make_tracker, start_of

EVERY_SECONDS = 2.0  # --follow looks that often


@dataclass(frozen=True)
class TrackFlags:
    """Replay a run into a tracker: its configuration, every row of metrics.jsonl, its samples. Into RUN/trackers, unless the tracker's own
    settings (WANDB_MODE, TRACKIO_DIR, MLFLOW_TRACKING_URI) say otherwise."""

    run: Annotated[str, tyro.conf.Positional, arg(metavar="RUN")]
    """A run folder."""
    to: Annotated[str, arg(metavar="|".join(TRACKERS))]
    """The tracker."""
    follow: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Go on with what a running run adds, until it is finished."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit code."""
    examples = ("smedjan track runs/mine --to tensorboard", "smedjan track runs/mine --to wandb --follow")
    flags = parse(TrackFlags, "smedjan track", argv, *examples)
    return run_command(lambda: _track(flags))


def _track(flags: TrackFlags) -> int:
    from smedjan_common.run.claim import is_run
    from smedjan_common.run.folder import read_config

    folder = Path(flags.run)
    if flags.to == NONE:
        raise ConfigError(
            "--to none replays nothing.", "It is for `smedjan train --tracker none`.", f"Choose one of {', '.join(TRACKERS)}."
        )
    check_trackers([flags.to])
    if not folder.is_dir() or not is_run(folder):
        why = "It holds no run." if folder.is_dir() else f"There is no such folder. {beside(folder)}".rstrip()
        raise DataError(f"{flags.run!r} is not a run.", why, "Give the folder of a run: smedjan track RUN --to tensorboard.")
    start = start_of(flags.to, folder, 0, read_config(folder) or {}, replay=True)
    try:
        tracker = make_tracker(flags.to)
        tracker.start(start)
        rows, samples = _replay(tracker, folder, flags.follow)
        tracker.finish(0)
    except (SmedjanError, OSError):
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0][:200].rstrip(".: ")
        raise SmedjanError(
            f"The tracker {flags.to} failed.", f"It says {why}.", "Look into its own settings; the run is not touched."
        ) from error
    print(f"replayed {rows} rows and {samples} samples of {folder} into {start.place}")
    print(f"to look at it: {TRACKERS[flags.to].where.format(place=start.place)}")
    return 0


def _replay(tracker: Tracker, folder: Path, follow: bool) -> tuple[int, int]:
    """How many rows and samples were passed on."""
    sent: set[tuple[int, bool]] = set()
    told: set[str] = set()
    while True:
        done = not follow or _is_done(folder)  # before it is read: what is written meanwhile is not missed
        for row in read_rows(folder):
            key = row["step"], "val_loss" in row
            if key not in sent and (known := figures(row)):
                tracker.log(row["step"], known)
                sent.add(key)
        for path in sorted((folder / SAMPLES).glob("step-*.txt")):
            if path.name not in told and path.stem[5:].isdecimal():
                tracker.text(int(path.stem[5:]), path.read_text(encoding="utf-8", errors="replace"))
                told.add(path.name)
        if done:
            return len(sent), len(told)
        time.sleep(EVERY_SECONDS)


def _is_done(folder: Path) -> bool:
    from smedjan_common.run.summary import summary

    return summary(folder)["finished"]
