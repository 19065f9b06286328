"""The tables of what training costs beside speed: memory, several GPUs, saves and conversions (bench/render.py)."""

from collections.abc import Callable

from bench.tables import gib, newest, reports, table


def memory() -> str | None:
    """What each option costs and saves."""
    report = newest("memory")
    if not report:
        return None
    parts = []
    for size in dict.fromkeys(row["size"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["size"] == size and "error" not in row]
        if not rows:
            continue
        shape = f"{size} ({rows[0]['batch_size']} x {rows[0]['seq_len']}, vocabulary {rows[0]['vocab_size']}), {report['device']}:"
        body = [
            [f"`{row['gradient_checkpointing']}`", str(row["grad_accum"]), str(row.get("loss_chunks", row["logits"]))]
            + (["out of memory", "-"] if row.get("out_of_memory") else [f"{row['tokens_per_second']:,}", gib(row["peak_memory_bytes"])])
            for row in rows
        ]
        parts.append(shape + "\n\n" + table(["checkpointing", "parts", "chunks of the loss", "tokens/s", "memory, GiB"], body))
    return "\n\n".join(["Each option alone and with the others (JAX, `python -m bench.memory`; parts: `--grad-accum`):", *parts])


def mesh() -> str | None:
    """Several GPUs beside one."""
    found = newest("mesh")
    if not found:
        return None
    body = [
        [
            row["size"],
            f"`{row['mesh']}`",
            f"{row['batch_size']} x {row['seq_len']}",
            f"{row['tokens_per_second']:,}",
            f"{row['times_one_device']:.2f}",
            gib(row["peak_memory_bytes"]),
        ]
        for row in found
    ]
    head = ["model", "`--mesh`", "batch x seq", "tokens/s", "times one GPU", "memory of a GPU, GiB"]
    return f"{found[0]['device']}, {found[0]['dtype']}, JAX {found[0]['versions']['jax']}:\n\n{table(head, body)}"


def stalls() -> str | None:
    """How long training waits for a save, every device."""
    parts = []
    for report in reports("checkpoint-stall").values():
        shape = f"{report['size']}, {report['state_bytes'] / 1e9:.2g} GB of state, steps of {report['step_seconds']:.2g} s"
        body = [
            [
                way,
                *(
                    f"{row[key]:.2g}" if row[key] is not None else "-"
                    for key in ("stall_seconds", "written_seconds", "step_seconds_meanwhile")
                ),
            ]
            for way, row in report["saves"].items()
        ]
        head = ["save", "training waits, s", "it stands after, s", "a step meanwhile, s"]
        busy = f", load {report['load']:.0f} on {report['cores']} cores" if report["load"] > report["cores"] else ""
        parts.append(f"{shape} ({report['device']}{busy}; `{report['command']}`):\n\n{table(head, body)}")
    return "\n\n".join(parts) or None


def converts() -> str | None:
    """Memory that `convert` takes beyond what it takes for a tiny model."""
    parts = []
    for report in reports("checkpoint-convert").values():
        body = [
            [name, *(f"{row[key] / 1e9:.2g}" for key in ("model_bytes", "peak_anonymous_bytes", "peak_bytes")), f"{row['seconds']:.0f}"]
            for name, row in report["converts"].items()
        ]
        head = ["", "arrays, GB", "memory of its own, GB", "with mapped files, GB", "seconds"]
        parts.append(f"{report['parameters'] / 1e6:,.0f}M parameters (`{report['command']}`):\n\n{table(head, body)}")
    return "\n\n".join(parts) or None


def starts() -> str | None:
    """What the compilation cache saves, on a GPU and on a CPU."""
    parts = []
    for report in reports("starts").values():
        units = {"cpu_seconds": "seconds of CPU", "seconds": "seconds to the first step", "step_seconds": "of them compiling and the step"}
        names = [name for name in units if f"first_{name}" in report["rows"][0]]
        body = [
            [f"{row['size']}, `{row['mixer']}`", *(f"{row[f'{n}_{name}']:.1f}" for name in names for n in ("first", "second"))]
            for row in report["rows"]
        ]
        head = ["two steps of training", *(f"{units[name]}, {which} start" for name in names for which in ("first", "second"))]
        parts.append(f"{report['device']}, JAX {report['versions']['jax']} (`{report['command']}`):\n\n{table(head, body)}")
    return "\n\n".join(parts) or None


PARTS: dict[str, Callable[[], str | None]] = {
    "memory": memory,
    "mesh": mesh,
    "starts": starts,
    "stalls": stalls,
    "converts": converts,
}
