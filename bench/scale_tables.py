"""The tables of several GPUs and of loss curves, from bench/results/scale-*.json and curves-*.json (docs/scale.md)."""

from collections.abc import Callable

from bench.rows import Row
from bench.tables import newest, table

NAMES = {"attention": "attention", "gated-deltanet,gated-deltanet,gated-deltanet,attention": "3 gated-deltanet : 1 attention"}
SAME = ("size", "seq_len", "dtype", "mixer")


def scale() -> str | None:
    """Every row: speed of a GPU, times one GPU, both FLOP counters, memory."""
    report = newest("scale")
    if not report:
        return None
    rows = [row for row in report["rows"] if "tokens_per_second" in row and not row.get("table")]
    body = []
    for row in rows:
        alone = _alone(row, rows)
        times = f"{row['tokens_per_second'] / alone['tokens_per_second']:.2f}" if alone else "-"
        body.append(
            [
                row["size"] + _remarks(row),
                row["dtype"],
                f"`{row['mesh']}`",
                f"{row['batch_size']} x {row['seq_len']}",
                f"{row['tokens_per_second_per_device']:,}",
                times,
                f"{row['tflops_causal_once']:.0f} / {row['tflops_full_square']:.0f}",
                f"{row['bytes'] / 2**30:.1f}",
            ]
        )
    head = [
        "model",
        "dtype",
        "`--mesh`",
        "batch x seq",
        "tokens/s of a GPU",
        "times one GPU",
        "TFLOP/s of a GPU, causal once / full square",
    ]
    versions = rows[0]["versions"]
    return f"{rows[0]['device']}, JAX {versions['jax']}:\n\n{table([*head, 'memory of a GPU, GiB'], body)}"


def _alone(row: Row, rows: list[Row]) -> Row | None:
    """The row of one GPU that a row is held against: as many sequences for each GPU, or, split by tensor alone, in all."""
    if row["devices"] == 1 or row.get("xla") or row.get("mask_documents"):
        return None
    same = (one for one in rows if one["devices"] == 1 and all(one[name] == row[name] for name in SAME))
    return next((one for one in same if one["rows"] == row["rows"]), None)


def _remarks(row: Row) -> str:
    mixer = str(row["mixer"])
    said = [NAMES.get(mixer, mixer)] if mixer != "attention" else []
    said += ["--mask-documents"] if row.get("mask_documents") else []
    said += ["latency hiding scheduler"] if row.get("xla") else []
    said += ["others compiled meanwhile"] if row.get("shared") else []
    return f" ({', '.join(said)})" if said else ""


def gathers() -> str | None:
    """What it saves that matrices are gathered again."""
    report = newest("scale")
    found = {row.get("again", True): row for row in (report or {"rows": []})["rows"] if "messages" in row and _plain_fsdp(row)}
    if len(found) < 2:
        return None
    body = [
        [name, str(row["messages"]["all-gather"]), str(row["messages"]["reduce-scatter"]), f"{row['temp_bytes'] / 2**30:.1f}"]
        for again, name in ((False, "once, kept for the backward pass"), (True, "again for the backward pass"))
        for row in (found[again],)
    ]
    head = ["xxl, `fsdp=4`, 64 x 2048: matrices are gathered", "all-gathers in the program", "reduce-scatters", "temporary memory, GiB"]
    return table(head, body)


def _plain_fsdp(row: Row) -> bool:
    wanted = {"size": "xxl", "mesh": "fsdp=4", "dtype": "bfloat16", "mixer": "attention", "seq_len": 2048}
    return all(row.get(name) == value for name, value in wanted.items()) and not row.get("xla") and not row.get("mask_documents")


def saved() -> str | None:
    """A save of a large run."""
    rows = [row for row in (newest("scale") or {"rows": []})["rows"] if row.get("table") == "checkpoint"]
    if not rows:
        return None
    row = rows[0]
    written = f"{row['written_seconds']:.0f} s" if row["written_seconds"] else "longer than was waited for"
    meanwhile = f"{row['step_seconds_meanwhile']:.2f} s" if row["step_seconds_meanwhile"] else "-"
    head = ["parameters", "state, GB", "the loop waits", "whole on disk after", "a step without a save", "a step meanwhile"]
    body = [f"{row['parameters'] / 1e9:.1f}B", f"{row['state_bytes'] / 1e9:.0f}", f"{row['stall_seconds']:.1f} s", written]
    return table(head, [[*body, f"{row['step_seconds']:.2f} s", meanwhile]])


def data_rates() -> str | None:
    """What a core does of the making of data, and what that is for billions of documents."""
    report = newest("data_rates")
    if not report:
        return None
    rates, machine = report["rates"], f"{report['machine']}, Python {report['python']}"
    workers = [[name, f"{rate:,.1f}", f"{_BILLION / rate / 3600e6:,.0f}"] for name, rate in rates["worker"].items()]
    one = [[name, f"{rate:,.0f}", f"{_BILLION / rate / 3600e6:,.1f}"] for name, rate in rates["one"].items()]
    hours = 1e9 / rates["documents_grouped"] / 3600
    return "\n\n".join(
        [
            f"Measured: {machine}, {report['documents']:,} documents. Computed: the columns of 10⁹ documents, 3 kB each.",
            table(["what a worker does", "MB of text a CPU second", "core hours for 10⁹ documents"], workers),
            table(["what the one process does", "MB of text a CPU second", "hours for 10⁹ documents"], one),
            f"`dedup` groups {rates['documents_grouped']:,} documents a second in that process, {hours:,.1f} hours for 10⁹.",
        ]
    )


_BILLION = 3e12  # bytes of 10⁹ documents


def meshes() -> str | None:
    """Training on real GPUs against one."""
    rows = [row for row in (newest("scale") or {"rows": []})["rows"] if row.get("table") == "equal"]
    if not rows:
        return None
    body = [
        [
            row["run"],
            f"`{row['mesh']}`",
            str(row["steps"]),
            "; ".join(f"{each['value']:.1e} of {each['gate']:.0e}" for each in row["largest"]),
        ]
        for row in rows
    ]
    return table(["run", "`--mesh`", "steps", "largest relative difference of each gate"], body)


def curves() -> str | None:
    """How far loss curves are apart."""
    report = newest("curves")
    if not report:
        return None
    body = []
    for pair in report["pairs"]:
        goal = f"{100 * pair['gate']:.1f} %" if pair["gate"] else "-"
        shares = [f"{100 * pair['largest']:.2f} %", f"{100 * pair['last']:+.2f} %", goal]
        body.append([pair["pair"], str(pair["steps"]), f"{pair['loss']:.3f}", *shares])
    head = ["pair", "steps", "loss at the end", f"largest difference, means of {report['window']} steps", "of the last tenth", "goal"]
    return f"![Loss curves side by side](images/curves.png)\n\n{table(head, body)}"


PARTS: dict[str, Callable[[], str | None]] = {
    "scale": scale,
    "gathers": gathers,
    "saved": saved,
    "meshes": meshes,
    "curves": curves,
    "data-rates": data_rates,
}
