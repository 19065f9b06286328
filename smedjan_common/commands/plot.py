"""`smedjan plot RUN [RUN …]`: the loss of one or several runs over tokens."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import arg

from smedjan_common.command_line import parse
from smedjan_common.errors import ConfigError, DataError, run_command, unknown
from smedjan_common.files.names import METRICS, PLOT
from smedjan_common.nearby import beside
from smedjan_common.optional import MaybeStr
from smedjan_common.reporting.curves import AXES, SMOOTH, Curve
from smedjan_common.reporting.metrics import read_rows
from smedjan_common.reporting.plot import LOGS, Look, is_drawn_here, plot

SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class PlotFlags:
    """Draw training and validation loss over tokens, from metrics.jsonl of run folders."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, arg(metavar="RUN ...", help_behavior_hint="(required)")]
    """Run folders."""
    output: Annotated[MaybeStr, arg(metavar="FILE", help_behavior_hint="(default: RUN/loss.png, or loss.png for several)")] = None
    """The picture: .png, .svg or .pdf. One that `smedjan` drew is replaced."""
    x: Annotated[str, arg(metavar="|".join(AXES))] = "tokens"
    """What the loss is drawn over."""
    smooth: float = SMOOTH
    """The part of a curve that smoothing looks at around each point. 0: the losses as they are."""
    log: Annotated[str, arg(metavar="|".join(LOGS))] = "none"
    """Which axes are logarithmic."""
    force: bool = False
    """Replace any file of this name."""


def main(argv: list[str] | None = None) -> int:
    """Run the command; its exit code."""
    flags = parse(PlotFlags, "smedjan plot", argv, "smedjan plot runs/mine", "smedjan plot runs/a runs/b --output loss.png")
    return run_command(lambda: _plot(flags))


def _plot(flags: PlotFlags) -> int:
    from smedjan_common.commands.outputs import check_outputs
    from smedjan_common.run.summary import flops_per_token

    if not flags.runs:
        raise DataError("There is nothing to draw.", "No run folder was given.", "Give one or more: smedjan plot RUN.")
    _check_look(flags)
    output = Path(flags.output) if flags.output else Path(flags.runs[0]) / PLOT if len(flags.runs) == 1 else Path(PLOT)
    if output.suffix not in SUFFIXES:
        raise DataError(
            f"{str(output)!r} is not a kind of picture that can be drawn.", "The suffix decides the kind.", f"Take {', '.join(SUFFIXES)}."
        )
    is_ours = output.is_file() and is_drawn_here(output)
    check_outputs([str(output)], flags.force or is_ours, [str(Path(name) / METRICS) for name in flags.runs])
    runs = {}
    for name in flags.runs:
        rows = read_rows(name)
        runs[label(name, flags.runs)] = curve = Curve(rows, flops_per_token(Path(name)))
        if not rows:
            why = "It has no metrics.jsonl with a row." if Path(name).exists() else f"There is no such folder. {beside(name)}".rstrip()
            raise DataError(f"There are no metrics in {name!r}.", why, "Give the folder of a run.")
        if not curve.has(flags.x):
            raise DataError(f"The FLOPs of {name!r} are not known.", "Its config.json, which has the model, is gone.", "Take --x tokens.")
    title = Path(flags.runs[0]).resolve().name if len(runs) == 1 else "training loss (dashed: validation)"
    plot(runs, output, title, Look(flags.x, flags.smooth, flags.log))
    print(f"drew {output}")
    return 0


def _check_look(flags: PlotFlags) -> None:
    for name, value, known in (("--x", flags.x, AXES), ("--log", flags.log, LOGS)):
        if value not in known:
            raise unknown(name, value, known)
    if not 0 <= flags.smooth < 1:
        raise ConfigError(f"--smooth is {flags.smooth:g}.", "It is a part of the curve: at least 0, less than 1.", "Give 0.05, say.")


def label(run: str, runs: tuple[str, ...]) -> str:
    """The folder's name; the whole path where two share it."""
    name = Path(run).resolve().name
    return name if sum(Path(other).resolve().name == name for other in runs) == 1 else run
