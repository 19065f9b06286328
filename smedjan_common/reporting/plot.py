"""loss.png: training and validation loss over tokens, for one run or several. matplotlib is imported only here, without a display."""

import warnings
from pathlib import Path

from smedjan_common.files.atomic_file import atomic_path
from smedjan_common.reporting.console import count
from smedjan_common.reporting.metrics import Row, eval_rows, train_rows

COLORS = ("#1f5fa8", "#c2571a", "#3a7d44", "#8a3f8f", "#a8322e", "#5b5b5b")

MARK = "drawn by smedjan plot"  # in the file's own description, so that a picture of another program is not replaced


def plot(runs: dict[str, list[Row]], output: Path, title: str = "") -> None:
    """Draw `runs` (label -> rows of metrics.jsonl) into a .png, .svg or .pdf, atomically. Raises ValueError for another suffix."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    losses = []
    for number, (label, rows) in enumerate(runs.items()):
        losses += _draw(axes, rows, label, COLORS[number % len(COLORS)])
    _frame(axes, losses, title)
    with atomic_path(output) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # an emoji in a folder's name
        figure.savefig(temporary, format=output.suffix[1:], metadata={"Software" if output.suffix == ".png" else "Creator": MARK})


def is_drawn_here(picture: Path) -> bool:
    """Whether a picture is one of `plot`'s. Raises OSError."""
    return MARK.encode() in picture.read_bytes()


def _draw(axes, rows: list[Row], label: str, color: str) -> list[float]:
    """One run: the logged losses faint, their running mean strong, validation as points. Returns the losses past the start."""
    train = train_rows(rows)
    tokens, losses = [row["tokens"] for row in train], [row["loss"] for row in train]
    noisy = len(train) > 30
    axes.plot(tokens, losses, color=color, linewidth=0.8 if noisy else 1.8, alpha=0.3 if noisy else 1, label=None if noisy else label)
    if noisy:
        axes.plot(tokens, running_mean(losses), color=color, linewidth=1.8, label=label)
    per_step = train[-1]["tokens"] / train[-1]["step"] if train else 1
    checks = eval_rows(rows)
    if checks:
        axes.plot(
            [row["step"] * per_step for row in checks],
            [row["val_loss"] for row in checks],
            color="black",
            marker="o",
            markersize=4,
            linewidth=1,
            linestyle="--",
            markerfacecolor=color,
            markeredgecolor="black",
            markeredgewidth=0.6,
            label=label.replace("training", "validation") if "training" in label else f"{label}, validation",
        )
    return losses[len(losses) // 50 :] + [row["val_loss"] for row in checks]


def _frame(axes, losses: list[float], title: str) -> None:
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter(lambda value, _: count(value) if value else "0")
    if losses:
        low, high = min(losses), max(losses)
        margin = 0.06 * (high - low) or 0.1
        axes.set_ylim(low - margin, high + margin)
        axes.legend(frameon=False)
    axes.set_xlim(left=0)
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def running_mean(values: list[float], share: float = 0.05) -> list[float]:
    """Mean of each value with its neighbours: a centred window of `share` of the curve, narrower towards the ends."""
    half = max(1, int(len(values) * share / 2))
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for at in range(len(values)):
        reach = min(half, at, len(values) - 1 - at)
        means.append((sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1))
    return means
