"""The tables of bench.kernels and of the PyTorch peer, for bench/render.py: each step beside that of attention in the same run."""

from collections.abc import Callable

from bench.rows import Row
from bench.tables import gib, newest, reports, table

SPECIAL = "deterministic", "mask_documents"  # what a row of bench.train_speed has besides


WHO = {
    "jax": "smedjan, JAX",
    "mlx": "smedjan, MLX on CUDA",
    "torch": "transformers + torch.compile, SDPA, fused AdamW",
    "torch-strong": "PyTorch written for speed",
}


def speed() -> str | None:
    """A training step of each size and framework with its defaults, a table for each device, the newest first."""
    found = [_speed(rows) for rows in reversed(reports("train_speed").values())]
    return "\n\n".join(part for part in found if part) or None


def _speed(rows: list[Row]) -> str:
    rows = _first_of(rows, ("size", "backend", "dtype"), gradient_checkpointing="none", grad_accum=1)
    if not rows:
        return ""
    body = [
        [
            f"{row['size']} ({row['parameters'] / 1e6:,.0f}M, {row['vocab_size']})",
            f"{row['batch_size']} x {row['seq_len']}",
            WHO[row["backend"]] + (f", {row['dtype']}" if row["dtype"] != "bfloat16" else ""),
            f"{row['tokens_per_second']:,}",
            f"{row['tflops_causal_once']}",
            gib(row["peak_memory_bytes"]),
        ]
        for row in sorted(rows, key=lambda row: (row["parameters"], list(WHO).index(row["backend"]), row["dtype"]))
    ]
    head = ["model (parameters, vocabulary)", "batch x seq", "who", "tokens/s", "TFLOP/s", "memory, GiB"]
    return f"{rows[0]['device']}, bfloat16 compute unless it says otherwise:\n\n{table(head, body)}"


def saving() -> str | None:
    """What saves memory at medium, and what it costs, with each backend."""
    own = [row for row in _train_speed() if row["backend"] in ("jax", "mlx") and row["size"] == "medium"]
    body = []
    for row in sorted(_first_of(own, ("backend", "gradient_checkpointing", "grad_accum"), notes=True), key=lambda row: row["backend"]):
        flags = [f"`--gradient-checkpointing {row['gradient_checkpointing']}`"] if row["gradient_checkpointing"] != "none" else []
        flags += [f"`--grad-accum {row['grad_accum']}`"] if row["grad_accum"] > 1 else []
        option = ", ".join(flags) or "none"
        option += f" ({row['note']})" if "note" in row else ""
        body.append([row["backend"].upper(), option, f"{row['tokens_per_second']:,}", gib(row["peak_memory_bytes"])])
    return table(["backend", "option", "tokens/s", "memory, GiB"], body) if body else None


def _train_speed() -> list[Row]:
    """The rows of the longest file of bench.train_speed."""
    return max(reports("train_speed").values(), key=len, default=[])


def _first_of(rows: list[Row], key: tuple[str, ...], notes: bool = False, **fixed: str | int) -> list[Row]:
    """The first row of each `key`, of those that have nothing special about them; notes: a row with a note where there is no other."""
    plain = [row for row in rows if not any(row.get(name) for name in SPECIAL) and all(row[name] == value for name, value in fixed.items())]
    found: dict[tuple, Row] = {}
    for row in sorted(plain, key=lambda row: "note" in row):
        if notes or "note" not in row:
            found.setdefault(tuple(row[name] for name in key), row)
    return list(found.values())


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
    """Our steps with attention beside the PyTorch model written for speed, of the same machine and run."""
    body = []
    for rows in reports("train_speed").values():
        plain = _first_of(rows, ("size", "backend", "dtype"), gradient_checkpointing="none", grad_accum=1)
        others = {(row["size"], row["batch_size"], row["seq_len"]): row for row in plain if row["backend"] == "torch-strong"}
        for row in plain:
            other = others.get((row["size"], row["batch_size"], row["seq_len"]))
            if other and row["backend"] == "jax":
                ratio = row["tokens_per_second"] / other["tokens_per_second"]
                name = f"{row['size']}, {row['batch_size']} x {row['seq_len']}, {row['dtype']}"
                body.append([name, *(f"{each['tokens_per_second']:,}" for each in (row, other)), f"{ratio:.2f}"])
                about = f"{row['device']}, torch {other['versions']['torch']}, tokens/s"
    return table([about, "smedjan, JAX", "PyTorch written for speed, bfloat16", "times"], body) if body else None


def _about(report: Row) -> str:
    return f"{report['device']}, {report['dtype']}, JAX {report['versions']['jax']}, {report['date']}"


PARTS: dict[str, Callable[[], str | None]] = {
    "speed": speed,
    "saving": saving,
    "kernels": kernels,
    "kernel-lengths": lengths,
    "peers": peers,
}
