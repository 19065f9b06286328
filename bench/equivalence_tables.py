"""The tables of docs/equivalence.md, from bench/results/conformance-*.json (bench/render.py)."""

from collections.abc import Callable

from bench import bfloat16
from bench.rows import Row
from bench.tables import reports, table

CHECKS = {
    "forward": "logits against the reference",
    "loss": "loss",
    "gradients": "gradients",
    "decoding": "decoding token by token",
    "documents": "logits with documents kept apart",
    "chunk sizes": "logits in other chunks",
    "optimizer": "20 optimizer steps on equal gradients",
    "accumulation": "gradients accumulated over two parts",
    "checkpointing": "gradients with checkpointing",
}
BETWEEN = {
    "forward": "logits",
    "gradients": "gradients",
    "20 steps loss": "20 steps of training: loss",
    "20 steps parameters": "20 steps of training: parameters",
}


def conformance() -> dict[str, list[Row]]:
    """Device (h100, cpu) -> rows of all its files; of a CPU the row of the file of all combinations, where it is in that and in another."""
    found: dict[str, list[Row]] = {}
    for name, report in sorted(reports("conformance").items(), key=lambda item: item[0].startswith("cpu-")):
        rows = found.setdefault(name.split("-")[0], [])
        have = {(row["combination"], row["dtype"]) for row in rows if name.startswith("cpu-")}
        rows += [_held(row) for row in report["combinations"] if (row["combination"], row["dtype"]) not in have]
    return found


def _held(row: Row) -> Row:
    """In bfloat16 with the gates that are the combination's rounding noise: a file may be older than they are."""
    if row["dtype"] != "bfloat16":
        return row
    figures = {}
    for name, figure in row["figures"].items():
        gate = bfloat16.gate(row["combination"], name, figure["gate"])
        figures[name] = {**figure, "gate": gate, "conforms": figure["value"] <= gate}
    return {**row, "figures": figures}


def equivalence() -> str | None:
    """The largest difference of every check by device and backend, then what each combination has."""
    found = conformance()
    if not found:
        return None
    return "\n\n".join([_largest(found, "float32"), _largest(found, "bfloat16"), _rounded(found), _combinations(found["cpu"])])


def _largest(found: dict[str, list[Row]], dtype: str) -> str:
    devices = {device: kept for device in sorted(found) if (kept := [row for row in found[device] if row["dtype"] == dtype])}
    if not devices:
        return ""
    counts = ", ".join(f"{len(rows)} on {_device(device)}" for device, rows in devices.items())
    sides = [(device, backend) for device in devices for backend in ("jax", "mlx")]
    against = [[text, *_cells([(devices[d], f"{b} {check}") for d, b in sides])] for check, text in CHECKS.items()]
    between = [[text, *_cells([(rows, f"mlx-jax {check}") for rows in devices.values()])] for check, text in BETWEEN.items()]
    return "\n\n".join(
        [
            f"The largest relative difference of any combination, {dtype} ({counts}; bold: over its gate):",
            table(["", "gate", *(f"{_device(d)}: {b.upper()}" for d, b in sides)], [row for row in against if set(row[1:]) != {"-"}]),
            table(["MLX against JAX", "gate", *map(_device, devices)], [row for row in between if set(row[1:]) != {"-"}]),
        ]
    )


def _rounded(found: dict[str, list[Row]]) -> str:
    """In bfloat16 every combination with its own gates."""
    shown = {"forward": "logits", "decoding": "decoding", "gradients": "gradients"}
    body = []
    for device in sorted(found):
        for row in (row for row in found[device] if row["dtype"] == "bfloat16"):
            cells = [f"{row['combination']}, {_device(device)}"]
            for checks in (*([f"jax {name}", f"mlx {name}"] for name in shown), ["mlx-jax 20 steps loss"], ["mlx-jax 20 steps parameters"]):
                figures = [row["figures"].get(check) for check in checks]
                cells += [next((_short(figure["gate"]) for figure in figures if figure), "-")]
                cells += [_farthest([figure]) if figure else "-" for figure in figures]
            body.append(cells)
    between = ["20 steps, loss: gate", "MLX against JAX", "parameters: gate", "MLX against JAX"]
    head = ["bfloat16", *(text for name in shown.values() for text in (f"{name}: gate", "JAX", "MLX")), *between]
    return table(head, body)


def _cells(sources: list[tuple[list[Row], str]]) -> list[str]:
    """The gate and the largest figure of each source."""
    figures = [[row["figures"][name] for row in rows if name in row["figures"]] for rows, name in sources]
    gates = {figure["gate"] for several in figures for figure in several}
    gate = (
        f"{min(gates):.0e}".replace("e-0", "e-") + (f" to {max(gates):.0e}".replace("e-0", "e-") if len(gates) > 1 else "")
        if gates
        else "-"
    )
    return [gate, *(_farthest(several) if several else "-" for several in figures)]


def _farthest(figures: list[Row]) -> str:
    """The largest figure; where some are over their gates, the largest of those, in bold."""
    over = [figure["value"] for figure in figures if not figure["conforms"]]
    return f"**{_short(max(over))}**" if over else _short(max(figure["value"] for figure in figures))


def _combinations(rows: list[Row]) -> str:
    checks = ["jax forward", "mlx forward", "jax gradients", "mlx gradients", "mlx-jax 20 steps loss", "mlx-jax 20 steps parameters"]
    head = ["combination (CPU, float32)", "logits: JAX", "MLX", "gradients: JAX", "MLX", "20 steps, MLX against JAX: loss", "parameters"]
    body = [
        [row["combination"], *(_short(row["figures"][check]["value"]) if check in row["figures"] else "-" for check in checks)]
        for row in rows
        if row["dtype"] == "float32"
    ]
    return table(head, body)


def _short(value: float) -> str:
    return f"{value:.1e}".replace("e-0", "e-") if value else "0"


def _device(name: str) -> str:
    return name.upper()


PARTS: dict[str, Callable[[], str | None]] = {
    "equivalence": equivalence,
}
