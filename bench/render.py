"""Fills the generated parts of the documentation and draws its pictures from the files in bench/results.

    python -m bench.render

A generated part stands between `<!-- bench:NAME -->` and `<!-- /bench:NAME -->` and is made by the function NAME of PARTS; the prose around
is kept. A part without results stays as it is. Each device has its own result files; those of an accelerator come first.
"""

import re
import statistics
from collections.abc import Callable

from bench import scale_tables, speed_tables
from bench.rows import ROOT, Row
from bench.tables import newest, reports, table
from smedjan_common.config import ModelConfig
from smedjan_common.errors import ConfigError
from smedjan_common.inference.memory import state_bytes
from smedjan_common.model.flops import train_flops_per_token
from smedjan_common.model.mixers import MIXERS

DOCS, IMAGES = ROOT / "docs", ROOT / "docs" / "images"
PAGES = ("checkpoints.md", "convert.md", "equivalence.md", "generate.md", "mixers.md", "performance.md", "scale.md", "training.md")
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


def main() -> None:
    """Write the pages and the pictures."""
    from bench import pictures

    for page in PAGES:
        path = DOCS / page
        path.write_text(rendered(path.read_text()))
    IMAGES.mkdir(exist_ok=True)
    for name, found in (("equivalence", conformance()), *((name, newest(name)) for name in ("learning", "mixers", "curves"))):
        if found:
            getattr(pictures, name)(found, IMAGES / f"{name}.png")


def rendered(text: str) -> str:
    """A page with its generated parts made anew."""

    def fill(match: re.Match) -> str:
        content = PARTS[match[1]]()
        return match[0] if content is None else f"<!-- bench:{match[1]} -->\n{content}\n<!-- /bench:{match[1]} -->"

    return re.sub(r"<!-- bench:([\w-]+) -->\n.*?<!-- /bench:\1 -->", fill, text, flags=re.DOTALL)


# equivalence


def conformance() -> dict[str, list[Row]]:
    """Device (h100, cpu) -> rows of all its files; of a CPU the row of the file of all combinations, where it is in that and in another."""
    found: dict[str, list[Row]] = {}
    for name, report in sorted(reports("conformance").items(), key=lambda item: item[0].startswith("cpu-")):
        rows = found.setdefault(name.split("-")[0], [])
        have = {(row["combination"], row["dtype"]) for row in rows if name.startswith("cpu-")}
        rows += [row for row in report["combinations"] if (row["combination"], row["dtype"]) not in have]
    return found


def equivalence() -> str | None:
    """The largest difference of every check by device and backend, then what each combination has."""
    found = conformance()
    if not found:
        return None
    return "\n\n".join([*(_largest(found, dtype) for dtype in ("float32", "bfloat16")), _combinations(found["cpu"])])


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
    """The largest figure, in bold when one is over its gate."""
    value = _short(max(figure["value"] for figure in figures))
    return value if all(figure["conforms"] for figure in figures) else f"**{value}**"


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


# mixers


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
        for field, text, shown in (("microseconds_per_token", "Microseconds", "{:.3g}"), ("bytes_per_token", "KiB", "{:.0f}")):
            scale = 1 if field == "microseconds_per_token" else 1024
            by = {(row["mixer"], row["seq_len"]): _cell(row, field, scale, shown) for row in rows}
            body = [[f"`{mixer}`", *(by.get((mixer, n), "") for n in lengths)] for mixer in dict.fromkeys(row["mixer"] for row in rows)]
            parts.append(f"{text} per token of a training step, {report['device']}, {stack}:\n")
            parts.append(table(["T", *map(_thousands, lengths)], body) + "\n")
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
    body = [[f"`{row['mixer']}`", *(_cell(row, *column) for column in shown)] for row in rows]
    head = ["medium, 64 x 1024", "parameters", "tokens/s", "TFLOP/s", "KiB per token"]
    return f"{report['device']}, {report['dtype']}, JAX {report['versions']['jax']}:\n\n" + table(head, body)


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
            _cell(row, "step_ms", 1, "{:.1f}"),
            _cell(row, "tokens_per_second", 1, "{:,.0f}"),
        ]
        for row in report["rows"]
    ]
    form = report["form"]
    shape = f"`{form['size']}`, {form['batch_size']} x {form['seq_len']} tokens, 2 experts of {form['expert_dim']} a token, {form['dtype']}"
    head = ["experts", "parameters", "active", "a step, ms", "tokens/s"]
    return f"{shape} ({report['device']}, `{report['command']}`):\n\n{table(head, body)}"


# performance


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
            + (["out of memory", "-"] if row.get("out_of_memory") else [f"{row['tokens_per_second']:,}", _gib(row["peak_memory_bytes"])])
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
            _gib(row["peak_memory_bytes"]),
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


def quantized() -> str | None:
    """Loss and size of a model and its quantised forms, on each device; times only where nothing else ran, which a file does not tell."""
    return "\n\n".join(_quantized(report) for report in reports("quantized").values()) or None


def _quantized(report: Row) -> str:
    of = {(row["model"], row["form"], row["backend"]): row for row in report["rows"]}
    body = []
    for model, form in dict.fromkeys((row["model"], row["form"]) for row in report["rows"]):
        jax, mlx = (of[model, form, backend] for backend in ("jax", "mlx"))
        losses = [f"{row['loss']:.4f}" if "loss" in row else "" for row in (jax, mlx)]
        cells = [f"{model}, {jax['parameters'] / 1e6:.1f}M", form if form == "float32" else f"{form} bits", f"{jax['bytes'] / 1e6:.1f}"]
        body.append([*cells, *losses])
    head = ["model", "weights", "MB", "loss, JAX", "loss, MLX"]
    return f"{report['device']}, float32 (`{report['command']}`):\n\n{table(head, body)}"


def sampling() -> str | None:
    """Milliseconds of choosing one token on the host, by vocabulary: as it was first written, and as it is."""
    report = newest("sampling")
    if not report:
        return None
    vocabularies = list(dict.fromkeys(row["vocabulary"] for row in report["rows"]))
    of = {(row["setting"], row["vocabulary"]): f"{row['plain_ms']:.2f} -> {row['ms']:.2f}" for row in report["rows"]}
    body = [[name, *(of[name, size] for size in vocabularies)] for name in dict.fromkeys(row["setting"] for row in report["rows"])]
    head = ["milliseconds a token, plain -> ours", *(f"{size:,} ids" for size in vocabularies)]
    return f"NumPy {report['versions']['numpy']}, one CPU core (`{report['command']}`):\n\n{table(head, body)}"


def speculation() -> str | None:
    """What a draft gains on each device, by how often it is right and how many texts are written at once."""
    return "\n\n".join(_speculation(report) for report in reports("speculation").values()) or None


def _speculation(report: Row) -> str:
    body = [
        [
            f"{row['size']}, {row['parameters'] / 1e6:.0f}M, {row['backend'].upper()}",
            f"{row['draft_parameters'] / 1e6:.0f}M",
            str(row["rows"]),
            f"{row['right']:.0%}",
            f"{row['cpu_ms_alone']:.1f} -> {row['cpu_ms']:.1f}",
            f"{row['cpu_ms_alone'] / row['cpu_ms']:.2f}",
            f"{row['tokens_per_second'] / row['tokens_per_second_alone']:.2f}",
        ]
        for row in sorted(report["rows"], key=lambda row: (row["rows"], row["parameters"], -row["right"]))
    ]
    head = ["model", "draft", "texts at once", "guesses right", "CPU ms a token, alone -> with draft", "times as fast", "by the clock"]
    return f"{report['device']}, float32, 4 tokens ahead (`{report['command']}`):\n\n{table(head, body)}"


def decode() -> str | None:
    """Tokens per second of decoding, ours and transformers', and how they were measured."""
    report = newest("decode")
    if not report:
        return None
    names = {"jax": "JAX", "mlx": "MLX", "torch": "transformers, static cache, torch.compile"}
    body = [
        [
            f"{row['size']}, `{row['mixer']}`",
            str(row["rows"]),
            "greedy" if row["temperature"] == 0 else f"temperature {row['temperature']}, top-p {row['top_p']}",
            names[row["backend"]],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['milliseconds_per_step']:.2f}",
            f"{row['tokens_per_second'] / row['roofline_tokens_per_second']:.0%}" if row["rows"] == 1 else "",
            row["measured"],
        ]
        for row in report["rows"]
    ]
    head = ["model", "rows", "choice", "with", "tokens/s", "ms a step", "of the weights' roofline", "measured"]
    versions = ", ".join(f"{name} {report['versions'][name]}" for name in ("jax", "torch", "transformers"))
    where = f"{report['device']}, {report['dtype']}, {report['entries']} positions held, {versions}"
    return f"{where} (`{report['rows'][0]['command']}` and so on):\n\n{table(head, body)}\n\n{report['notes']}"


def _cell(row: Row, field: str, scale: float, shown: str) -> str:
    if field in row and row[field] / scale >= 1000:
        shown = "{:,.0f}"  # three digits would be 1.23e+03
    return shown.format(row[field] / scale) if field in row else "out of memory" if "memory" in row.get("error", "").lower() else "-"


def _gib(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**30:.1f}"


def _thousands(value: int) -> str:
    return f"{value // 1024}k" if value >= 1024 else str(value)


PARTS: dict[str, Callable[[], str | None]] = {
    "equivalence": equivalence,
    "menu": menu,
    "length": length,
    "medium": medium,
    "learning": learning,
    "rope": rope,
    "experts": experts,
    "memory": memory,
    "kernels": speed_tables.kernels,
    "kernel-lengths": speed_tables.lengths,
    "peers": speed_tables.peers,
    "mesh": mesh,
    "sampling": sampling,
    "decode": decode,
    "stalls": stalls,
    "converts": converts,
    "quantized": quantized,
    "speculation": speculation,
    **scale_tables.PARTS,
}

if __name__ == "__main__":
    main()
