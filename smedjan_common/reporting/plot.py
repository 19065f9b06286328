"""loss.png: the loss of one run or several, and beneath it learning rate, gradient norm and speed. matplotlib is imported only here,
without a display.

A run has one colour: its losses faint, smoothed ones strong, validation dashed with points, the places where it was resumed or went to
another backend as thin lines. Labels stand at the ends of the lines.
"""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

from smedjan_common.files.atomic_file import atomic_path
from smedjan_common.reporting.console import count, lasted
from smedjan_common.reporting.curves import AXES, SMOOTH, Curve, apart, limits, smoothed

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito, 2008: also for the colour-blind
MARK = "drawn by smedjan plot"  # in the file's own description, so that a picture of another program is not replaced
NOISY = 30  # points from which on they are smoothed
PANELS = {"lr": "learning rate", "grad_norm": "gradient norm", "tokens_per_second": "tokens per second"}
CUT = 0.96  # of the losses: the highest, those of the first steps, leave the picture
LOGS = ("x", "y", "xy", "none")


class Look(NamedTuple):
    """axis: one of AXES. smooth: the share of a curve that smoothing looks at around a point; 0: none. log: which axes are logarithmic."""

    axis: str = "tokens"
    smooth: float = SMOOTH
    log: str = "none"


def plot(runs: dict[str, Curve], output: Path, title: str = "", look: Look = Look()) -> None:  # noqa: B008
    """Draw `runs` (label -> curve) into a .png, .svg or .pdf, atomically. Raises ValueError for another suffix."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.add_gridspec(2, 3, height_ratios=(3, 1))
    axes = figure.add_subplot(places[0, :])
    ends: list[tuple[float, float, str, str]] = []
    inside: list[float] = []
    always: list[float] = []
    for number, (label, curve) in enumerate(runs.items()):
        color = COLORS[number % len(COLORS)]
        _draw_loss(axes, curve, label, color, look, ends, inside, always, alone=len(runs) == 1)
    _frame(axes, look, title, "loss (nats per token)")
    if (found := limits(inside, always, 1.0 if look.log != "none" else CUT)) and (found[0] > 0 or "y" not in look.log):
        axes.set_ylim(*found)
    _label(axes, ends, look)
    for place, (key, name) in enumerate(PANELS.items()):
        panel = figure.add_subplot(places[1, place])
        _draw_panel(panel, runs, key, name, look)
    with atomic_path(output) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # an emoji in a folder's name
        figure.savefig(temporary, format=output.suffix[1:], metadata={"Software" if output.suffix == ".png" else "Creator": MARK})


def is_drawn_here(picture: Path) -> bool:
    """Whether a picture is one of `plot`'s. Raises OSError."""
    return MARK.encode() in picture.read_bytes()


def _draw_loss(
    axes: Any,
    curve: Curve,
    label: str,
    color: str,
    look: Look,
    ends: list[tuple[float, float, str, str]],
    inside: list[float],
    always: list[float],
    alone: bool,
) -> None:
    """One run. Adds to ends (x, y, label, colour) of its lines, to inside the losses that may leave the picture, to always the others."""
    xs, losses = curve.series("loss", look.axis)
    strong = smoothed(losses, look.smooth) if look.smooth and len(losses) > NOISY else losses
    if strong is not losses:
        axes.plot(xs, losses, color=color, linewidth=0.8, alpha=0.28)
    axes.plot(xs, strong, color=color, linewidth=2, marker="o" if len(losses) == 1 else None, markersize=4, solid_capstyle="round")
    inside += losses
    if strong:
        ends.append((xs[-1], strong[-1], "training" if alone else label, color))
        always += strong[len(strong) // 3 :]
    if curve.checks:
        x, y = curve.xs(curve.checks, look.axis), [row["val_loss"] for row in curve.checks]
        few = len(x) <= 40
        axes.plot(
            x, y, color=color, linewidth=1.4, linestyle=(0, (4, 2)), marker="o" if few else None, markersize=4, markerfacecolor="white"
        )
        always += y[len(y) // 3 :]
        inside += y
        if alone or not strong:
            ends.append((x[-1], y[-1], "validation", color))
    for at, event in zip(curve.xs(curve.events, look.axis), curve.events, strict=True):
        axes.axvline(at, color=color, linewidth=0.9, alpha=0.6, linestyle=":", zorder=0.5)
        here, before = event.get("backend"), event.get("before")
        words = f"{before} \N{RIGHTWARDS ARROW} {here}" if before and here != before else "resumed"
        axes.annotate(
            words,
            (at, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -3),
            textcoords="offset points",
            fontsize=7.5,
            color=color,
            va="top",
            rotation=90,
        )


def _label(axes: Any, ends: list[tuple[float, float, str, str]], look: Look) -> None:
    """The labels at the right of the picture, beside the ends of their lines, none over another."""
    at = [min(1.0, max(0.0, axes.transAxes.inverted().transform(axes.transData.transform((x, y)))[1])) for x, y, _, _ in ends]
    for place, (_, _, label, color) in zip(apart(at, 0.055), ends, strict=True):
        short = label if len(label) <= 28 else f"{label[:27]}\N{HORIZONTAL ELLIPSIS}"
        axes.annotate(
            short, (1, place), xycoords="axes fraction", xytext=(6, 0), textcoords="offset points", fontsize=9, color=color, va="center"
        )


def _draw_panel(panel: Any, runs: dict[str, Curve], key: str, name: str, look: Look) -> None:
    """A small one: a figure of all runs."""
    values: list[float] = []
    for number, curve in enumerate(runs.values()):
        xs, ys = curve.series(key, look.axis)
        color, strong = COLORS[number % len(COLORS)], smoothed(ys, look.smooth) if look.smooth and len(ys) > NOISY and key != "lr" else ys
        if strong is not ys:
            panel.plot(xs, ys, color=color, linewidth=0.6, alpha=0.25)
        panel.plot(xs, strong, color=color, linewidth=1.2, marker="." if len(xs) == 1 else None)
        values += ys
    _frame(panel, look._replace(log=look.log.replace("y", "") or "none"), name, "", small=True)
    shown = (lambda value: f"{value:.1e}".replace("e-0", "e-")) if key == "lr" else count
    panel.yaxis.set_major_formatter(lambda value, _: shown(value) if value else "0")
    if key == "lr" or not values:
        panel.set_ylim(bottom=0)
    elif found := limits(values, [], CUT):
        panel.set_ylim(0 if found[0] < 0.5 * found[1] else max(0.0, found[0]), found[1])


def _frame(axes: Any, look: Look, title: str, ylabel: str, small: bool = False) -> None:
    size = 7.5 if small else 9
    axes.set_title(title, loc="left", fontsize=9 if small else 12, fontweight="normal" if small else "bold")
    axes.set_ylabel(ylabel, fontsize=size + 1)
    if not small:
        axes.set_xlabel(AXES[look.axis] if look.axis != "time" else "time", fontsize=size + 1)
    if "x" in look.log:
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
    if "y" in look.log:
        axes.set_yscale("log")
        for ticks in ("major", "minor"):
            getattr(axes.yaxis, f"set_{ticks}_formatter")(lambda value, _: f"{value:g}")
    shown = lasted if look.axis == "time" else count
    axes.xaxis.set_major_formatter(lambda value, _: shown(value) if value else "0")
    axes.tick_params(labelsize=size, color="#999999")
    if small:
        axes.locator_params(axis="both", nbins=4) if look.log == "none" else None
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#999999")
