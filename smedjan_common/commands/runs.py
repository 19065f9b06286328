"""`smedjan runs [FOLDER …]`: what runs have reached, one line each."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import arg

from smedjan_common.command_line import parse
from smedjan_common.errors import DataError, run_command
from smedjan_common.nearby import beside


@dataclass(frozen=True)
class RunsFlags:
    """List runs and compare them in numbers: steps, tokens, loss, best validation, parameters, mixer, speed."""

    folders: Annotated[tuple[str, ...], tyro.conf.Positional, arg(metavar="FOLDER ...", help_behavior_hint="(default: runs)")] = ("runs",)
    """Run folders, and folders that hold runs."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit code."""
    flags = parse(RunsFlags, "smedjan runs", argv, "smedjan runs", "smedjan runs runs/a runs/b elsewhere/runs --json")
    return run_command(lambda: _runs(flags))


def _runs(flags: RunsFlags) -> int:
    from smedjan_common.run.summary import summary, table

    summaries = [summary(run) for folder in flags.folders for run in found(Path(folder))]
    print(json.dumps(summaries, indent=1) if flags.json else table(summaries))
    return 0


def found(folder: Path) -> list[Path]:
    """The folder itself where it is a run, else the runs in it. Raises DataError where there is none."""
    from smedjan_common.run.claim import is_run
    from smedjan_common.run.summary import runs_in

    if not folder.is_dir():
        raise DataError(f"There is no folder {str(folder)!r}.", beside(folder), "Name a folder that holds runs: smedjan runs FOLDER.")
    if runs := [folder] if is_run(folder) else runs_in(folder):
        return runs
    raise DataError(
        f"There is no run in {str(folder)!r}.", "Runs that lie deeper are not looked for.", "Name the folder that they are directly in."
    )
