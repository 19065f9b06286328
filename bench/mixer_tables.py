"""The tables of what a mixer is and does: docs/mixers.md and what it learns (bench/render.py)."""

import statistics
from collections.abc import Callable

from bench.tables import cell, newest, reports, table, thousands
from smedjan_common.config import ModelConfig
from smedjan_common.errors import ConfigError
from smedjan_common.inference.memory import state_bytes
from smedjan_common.model.flops import train_flops_per_token
from smedjan_common.model.mixers import MIXERS


def menu() -> str:
    """The rows of the table: what each is, its parameters and its decode state at medium."""
    body = []
    for name, row in MIXERS.items():
        try:
            model = ModelConfig.preset("medium", mixer=(name,), context_length=32768)
        except ConfigError:
            continue
        states = [f"{state_bytes(model, 1, length, 'bfloat16') / 2**20:.1f}" for length in (1024, 32768)]
        growth = train_flops_per_token(model, 32768) / train_flops_per_token(model, 1024)
        body.append([f"`{name}`", row.about, f"{model.num_params() / 1e6:.1f}M", f"{growth:.2f}", *states])
    return table(["`--mixer`", "what", "parameters", "FLOPs per token, 32k over 1k", "state at 1k, MiB", "at 32k, MiB"], body)


def length() -> str | None:
    """Time and memory per token by length, every device."""
    parts = []
    for report in reports("mixers").values():
        rows = [row for row in report["rows"] if row["table"] == "length"]
        lengths = sorted({row["seq_len"] for row in rows})
        framework = {"jax": "JAX", "mlx": "MLX"}[rows[0]["backend"]]
        stack = f"{framework}, {report['layers']} layers of width {report['dim']}, {report['tokens']} tokens a step, {report['dtype']}"
        stack += f" ({report['note']})" if "note" in report else ""
        for field, text, shown in (("microseconds_per_token", "Microseconds", "{:.3g}"), ("bytes_per_token", "KiB", "{:.0f}")):
            scale = 1 if field == "microseconds_per_token" else 1024
            by = {(row["mixer"], row["seq_len"]): cell(row, field, scale, shown) for row in rows}
            body = [[f"`{mixer}`", *(by.get((mixer, n), "") for n in lengths)] for mixer in dict.fromkeys(row["mixer"] for row in rows)]
            parts.append(f"{text} per token of a training step, {report['device']}, {stack}:\n")
            parts.append(table(["T", *map(thousands, lengths)], body) + "\n")
    return "\n".join(["![Time and memory per token by length](images/mixers.png)\n", *parts]).rstrip() if parts else None


def medium() -> str | None:
    """Speed at medium."""
    report = newest("mixers")
    rows = [row for row in (report or {"rows": []})["rows"] if row["table"] == "medium"]
    if not report or not rows:
        return None
    shown = (
        ("parameters", 1e6, "{:.1f}M"),
        ("tokens_per_second", 1, "{:,.0f}"),
        ("tflops_causal_once", 1, "{:.0f}"),
        ("bytes_per_token", 1024, "{:.0f}"),
    )
    body = [[f"`{row['mixer']}`", *(cell(row, *column) for column in shown)] for row in rows]
    head = ["medium, 64 x 1024", "parameters", "tokens/s", "TFLOP/s", "KiB per token"]
    note = f" ({report['note']})" if "note" in report else ""
    return f"{report['device']}, {report['dtype']}, JAX {report['versions']['jax']}{note}:\n\n" + table(head, body)


def learning() -> str | None:
    """Validation loss against attention's and the accuracies of recall."""
    report = newest("learning")
    if not report:
        return None
    rows = [row for row in report["rows"] if "error" not in row]
    losses: dict[str, list[float]] = {}
    for row in rows:
        if row["task"] == "corpus":
            losses.setdefault(row["mixer"], []).append(row["val_loss"])
    mean = {mixer: statistics.mean(values) for mixer, values in losses.items()}
    recall = {(row["task"], row["mixer"]): row["accuracy"] for row in rows if "accuracy" in row}
    body = []
    for mixer in dict.fromkeys(row["mixer"] for row in rows):
        loss = [f"{mean[mixer]:.3f}", f"{100 * (mean[mixer] / mean['attention'] - 1):+.1f} %"] if mixer in mean else ["", ""]
        right = [
            " / ".join(f"{100 * value:.0f}" for value in recall.get((task, mixer), {}).values()) for task in ("associative", "copying")
        ]
        body.append([f"`{mixer}`", *loss, *right])
    counts = " / ".join(next(iter(recall.values()))) if recall else ""
    shape = report["corpus"]
    intro = (
        f"{report['device']}, {shape['steps']} steps of {shape['batch_size']} x {shape['seq_len']} tokens, {len(report['seeds'])} seeds:"
    )
    head = ["mixer", "validation loss", "against attention", f"pairs recalled, %, of {counts}", f"tokens copied, %, of {counts}"]
    return f"![Validation loss, and accuracy of recall](images/learning.png)\n\n{intro}\n\n{table(head, body)}"


def rope() -> str | None:
    """Validation loss at 1, 2 and 4 times the trained context."""
    report = newest("rope_extension")
    if not report or not report["rows"]:
        return None
    rows = report["rows"]
    lengths = sorted({row["seq_len"] for row in rows})
    by = {(row["weights"], row["rope_scaling"], row["seq_len"]): f"{row['val_loss']:.3f}" for row in rows}
    kinds = dict.fromkeys((row["weights"], row["rope_scaling"]) for row in rows)
    names = {"trained": "", "trained on": f", after {report['more_steps']} more steps at {lengths[-1]}"}
    body = [[f"`{scaling}`{names[weights]}", *(by.get((weights, scaling, n), "") for n in lengths)] for weights, scaling in kinds]
    trained = f"{report['steps']} steps of {report['batch_size']} x {report['seq_len']} tokens"
    intro = f"`{report['size']}`, trained for {trained} ({report['device']}):"
    return f"{intro}\n\n{table(['`--rope-scaling`, factor 4; validation loss at', *map(str, lengths)], body)}"


def experts() -> str | None:
    """A step with 8 and 64 experts beside the dense model of equal active size."""
    report = newest("experts")
    if not report:
        return None
    body = [
        [
            f"{row['experts']}, `{row['implementation']}`" + (f" of {row['largest_block']}" if row["largest_block"] else "")
            if row["experts"]
            else "dense",
            f"{row['parameters'] / 1e6:.0f}M",
            f"{row['active_parameters'] / 1e6:.1f}M",
            cell(row, "step_ms", 1, "{:.1f}"),
            cell(row, "tokens_per_second", 1, "{:,.0f}"),
        ]
        for row in report["rows"]
    ]
    form = report["form"]
    shape = f"`{form['size']}`, {form['batch_size']} x {form['seq_len']} tokens, 2 experts of {form['expert_dim']} a token, {form['dtype']}"
    head = ["experts", "parameters", "active", "a step, ms", "tokens/s"]
    return f"{shape} ({report['device']}, `{report['command']}`):\n\n{table(head, body)}"


PARTS: dict[str, Callable[[], str | None]] = {
    "menu": menu,
    "length": length,
    "medium": medium,
    "learning": learning,
    "rope": rope,
    "experts": experts,
}
