"""The pictures of the documentation, from result files (bench/render.py). matplotlib without a display."""

import pathlib
import statistics
from typing import Any

from bench.rows import Row
from smedjan_common.reporting.plot import COLORS

FAINT = "#dddddd"


def equivalence(devices: dict[str, list[Row]], output: pathlib.Path) -> None:
    """Every combination in float32: how far logits, gradients and 20 steps are off, with the gates."""
    rows = [row for row in devices["cpu"] if row["dtype"] == "float32"]
    figure = _figure(11, 1.8 + 0.21 * len(rows))
    panels = (
        ("logits", (("jax forward", "JAX"), ("mlx forward", "MLX"), ("mlx-jax forward", "MLX against JAX"))),
        ("gradients", (("jax gradients", "JAX"), ("mlx gradients", "MLX"), ("mlx-jax gradients", "MLX against JAX"))),
        ("20 steps of training", (("mlx-jax 20 steps loss", "loss"), ("mlx-jax 20 steps parameters", "parameters"))),
    )
    all_axes = figure.subplots(1, 3, sharey=True)
    for axes, (title, checks) in zip(all_axes, panels, strict=True):
        offset = 2 if "20" in title else 0
        for number, (check, label) in enumerate(checks):
            color, marker = COLORS[(2, 3)[number] if offset else number], "osD"[number]
            found = [(place, row["figures"][check]) for place, row in enumerate(rows) if check in row["figures"]]
            values, places = [max(f["value"], 4e-8) for _, f in found], [place for place, _ in found]
            axes.plot(values, places, marker, color=color, markersize=4, label=label, zorder=3)
            for gate in {f["gate"] for _, f in found}:
                inside = [place for place, f in found if f["gate"] == gate]
                dashes = {"color": color if offset else "black", "linewidth": 1.2}
                axes.vlines(gate, min(inside) - 0.5, max(inside) + 0.5, linestyle="--", label=None, **dashes)
        axes.set_xscale("log")
        axes.set_xlim(3e-8, 3e-3 if offset else 1e-4)
        axes.set_title(title, loc="left", fontsize=10)
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.5 / figure.get_figheight()), ncols=len(checks))
        _clean(axes, "both")
    all_axes[0].set_yticks(range(len(rows)), [row["combination"] for row in rows], fontsize=7)
    all_axes[0].set_ylim(len(rows) - 0.4, -0.6)
    figure.suptitle("relative differences in float32 on the CPU; dashed: the gates", fontsize=9, x=0.01, ha="left")
    figure.savefig(output)


def learning(report: Row, output: pathlib.Path) -> None:
    """Validation loss of each mixer, and accuracy by the number of things to recall."""
    rows = [row for row in report["rows"] if "error" not in row]
    mixers = list(dict.fromkeys(row["mixer"] for row in rows))
    color = {mixer: _color(number) for number, mixer in enumerate(mixers)}
    figure = _figure(12, 4.4)
    losses, associative, copying = figure.subplots(1, 3)
    trained = [m for m in mixers if any(row["task"] == "corpus" and row["mixer"] == m for row in rows)]
    for place, mixer in enumerate(trained):
        values = [row["val_loss"] for row in rows if row["task"] == "corpus" and row["mixer"] == mixer]
        losses.plot(values, [place] * len(values), "|", color=color[mixer], markersize=12)
        losses.plot(statistics.mean(values), place, "o", color=color[mixer], markersize=7)
        if mixer == "attention":
            losses.axvline(statistics.mean(values) * 1.05, color="black", linestyle="--", linewidth=1)
    losses.set_yticks(range(len(trained)), [_label(mixer) for mixer in trained], fontsize=8)
    losses.set_ylim(len(trained) - 0.4, -0.6)
    losses.set_title("validation loss at tiny", loc="left", fontsize=10)
    losses.set_xlabel("nats a token; dashed: attention + 5 %")
    _clean(losses, "x")
    for axes, task, title in ((associative, "associative", "associative recall"), (copying, "copying", "selective copying")):
        for number, mixer in enumerate(mixers):
            for row in (row for row in rows if row["task"] == task and row["mixer"] == mixer):
                counts = [int(count) for count in row["accuracy"]]
                style = {"marker": "osD^vP*X"[number % 8], "linestyle": "--" if "," in mixer else "-", "markersize": 5, "linewidth": 1.5}
                axes.plot(counts, list(row["accuracy"].values()), color=color[mixer], label=_label(mixer), **style)
        axes.set_xscale("log", base=2)
        asked = sorted({int(count) for row in rows if row["task"] == task for count in row["accuracy"]})
        axes.set_xticks(asked, [str(count) for count in asked])
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("pairs" if task == "associative" else "tokens to copy")
        axes.set_title(f"{title}: accuracy", loc="left", fontsize=10)
        _clean(axes, "both")
    copying.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(output)


def mixers(report: Row, output: pathlib.Path) -> None:
    """Time and memory per token by length."""
    rows = [row for row in report["rows"] if row["table"] == "length" and "microseconds_per_token" in row]
    names = list(dict.fromkeys(row["mixer"] for row in rows))
    figure = _figure(11, 4.2)
    time, memory = figure.subplots(1, 2)
    for axes, field, scale, title in (
        (time, "microseconds_per_token", 1, "microseconds per token"),
        (memory, "bytes_per_token", 1024, "KiB per token"),
    ):
        for number, name in enumerate(names):
            points = sorted((row["seq_len"], row[field] / scale) for row in rows if row["mixer"] == name)
            style = {"marker": "osD^vP*X"[number % 8], "markersize": 5, "linewidth": 1.5}
            axes.plot(*zip(*points, strict=True), color=_color(number), label=name, **style)
        lengths = sorted({row["seq_len"] for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("length of the sequences")
        axes.set_title(f"{title}, training step", loc="left", fontsize=10)
        _clean(axes, "both")
    memory.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    about = f"{report['device']}, {report['layers']} layers of width {report['dim']}, {report['dtype']}"
    figure.suptitle(f"{about} ({report['note']})" if "note" in report else about, fontsize=9, x=0.01, ha="left")
    figure.savefig(output)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _color(number: int) -> str:
    return (*COLORS, "#1a9ba1", "#b58900", "#d46a9f", "#4f4fc4")[number % 10]


def _label(mixer: str) -> str:
    """`ssm,ssm,ssm,attention` -> 3 ssm : 1 attention."""
    parts = mixer.split(",")
    return mixer if len(parts) == 1 else " : ".join(f"{parts.count(name)} {name}" for name in dict.fromkeys(parts))


def _clean(axes: Any, grid: str) -> None:
    axes.grid(color=FAINT, linewidth=0.6, axis=grid)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def curves(report: Row, output: pathlib.Path) -> None:
    """Loss curves of each pair, one over the other, and how far they are apart, beside what the noise of the same curve comes to."""
    noise = [pair for pair in report["pairs"] if pair["pair"].startswith("noise")]
    pairs = list({pair["pair"]: pair for pair in reversed(report["pairs"]) if pair not in noise}.values())[::-1]  # the first of each name
    figure = _figure(3.2 * len(pairs), 4.4)
    panels = figure.subplots(2, len(pairs), squeeze=False, height_ratios=(2, 1))
    for (above, below), pair in zip(panels.T, pairs, strict=True):
        steps = [(number + 0.5) * pair["window"] for number in range(len(pair["curves"][0]))]
        for number, (name, losses) in enumerate(zip(pair["names"], pair["curves"], strict=True)):
            above.plot(steps, losses, color=COLORS[number], linestyle="-" if number == 0 else "--", linewidth=1.6, label=name)
        above.set_title(f"{pair['pair']}, {pair['steps']} steps", loc="left", fontsize=9)
        above.legend(frameon=False, fontsize=7)
        for beside in (each for each in noise if each["curves"][0] in pair["curves"]):
            below.plot(steps, _apart(beside), color="gray", linewidth=1.2, label="noise")
        below.plot(steps, _apart(pair), color=COLORS[2], linewidth=1.2, label="apart")
        for side in (-1, 1):
            below.axhline(side * 100 * pair["gate"], color="black", linestyle="--", linewidth=0.8)
        below.legend(frameon=False, fontsize=7)
        below.set_xlabel("step", fontsize=8)
        for axes in (above, below):
            axes.tick_params(labelsize=7)
            _clean(axes, "both")
    panels[0][0].set_ylabel("loss", fontsize=8)
    panels[1][0].set_ylabel("apart, %", fontsize=8)
    figure.savefig(output)


def _apart(pair: Row) -> list[float]:
    """How far the second curve is from the first, percent."""
    return [100 * (other / one - 1) for one, other in zip(*pair["curves"], strict=True)]
