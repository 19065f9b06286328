"""The tables of bench.kernels and of the PyTorch peer, for bench/render.py: each step beside that of attention in the same run."""

from collections.abc import Callable

from bench.rows import Row
from bench.tables import newest, reports, table


def kernels() -> str | None:
    """Training steps with kernels and with the plain forms, a table for each device."""
    return "\n\n".join(_one_length(report) for report in reports("kernels").values()) or None


def _one_length(report: Row) -> str:
    rows = [row for row in report["rows"] if "error" not in row]
    speed = {(row["mixer"], row["kernels"]): row["tokens_per_second"] for row in rows}
    attention, body = speed.get(("attention", "auto")), []
    for mixer in dict.fromkeys(row["mixer"] for row in rows):
        plain, fast = speed.get((mixer, "plain")), speed.get((mixer, "pallas"), speed.get((mixer, "auto")))
        best = fast or plain
        cells = [f"{each:,}" if each else "-" for each in (plain, fast)]
        body.append([f"`{mixer}`", *cells, f"{best / attention:.2f}" if best and attention else "-"])
        if masked := speed.get((mixer, "masked")):
            body.append([f"`{mixer}`, cuDNN with a mask", "-", f"{masked:,}", f"{masked / attention:.2f}" if attention else "-"])
    head = [f"{report['size']}, 64 x 1024, tokens/s", "plain", "kernels", "over attention"]
    return f"{_about(report)}, all in one run:\n\n" + table(head, body)


def lengths() -> str | None:
    """The same tokens in longer sequences, 4 layers of medium."""
    report = newest("kernel_lengths")
    if not report:
        return None
    rows = [row for row in report["rows"] if "error" not in row]
    speed = {(row["mixer"], row["seq_len"]): row["tokens_per_second"] for row in rows}
    columns = sorted({length for _, length in speed})
    body = []
    for mixer in dict.fromkeys(mixer for mixer, _ in speed):
        cells = [f"{speed[mixer, T]:,} ({speed[mixer, T] / speed['attention', T]:.2f})" if (mixer, T) in speed else "-" for T in columns]
        body.append([f"`{mixer}`", *cells])
    head = ["4 layers of 512, 65,536 tokens a step: tokens/s (over attention)", *(f"{T:,} positions" for T in columns)]
    return f"{_about(report)}, all in one run:\n\n" + table(head, body)


def peers() -> str | None:
    """Attention beside the PyTorch model written for speed, at medium in one run of one machine."""
    body = []
    for device, ours in reports("kernels").items():
        others = [row for row in reports("train_speed").get(device, []) if row["backend"] == "torch-strong" and row["size"] == ours["size"]]
        mine = next((row for row in ours["rows"] if row["mixer"] == "attention"), None)
        if others and mine:
            other = others[-1]
            ratio = mine["tokens_per_second"] / other["tokens_per_second"]
            speeds = [f"{row['tokens_per_second']:,}" for row in (mine, other)]
            body.append([f"{ours['device']}, torch {other['versions']['torch']}", *speeds, f"{ratio:.2f}"])
    return table(["medium, 64 x 1024, tokens/s", "smedjan, JAX", "PyTorch written for speed", "times"], body) if body else None


def _about(report: Row) -> str:
    return f"{report['device']}, {report['dtype']}, JAX {report['versions']['jax']}, {report['date']}"


PARTS: dict[str, Callable[[], str | None]] = {"kernels": kernels, "kernel-lengths": lengths, "peers": peers}
