"""The tables of inference: quantised models, sampling, drafts and decoding (bench/render.py)."""

from collections.abc import Callable

from bench.rows import Row
from bench.tables import newest, reports, table


def quantized() -> str | None:
    """Loss and size of a model and its quantised forms, on each device; times only where nothing else ran, which a file does not tell."""
    return "\n\n".join(_quantized(report) for report in reports("quantized").values()) or None


def _quantized(report: Row) -> str:
    of = {(row["model"], row["form"], row["backend"]): row for row in report["rows"]}
    backends = [name for name in ("jax", "mlx") if any(name == backend for _, _, backend in of)]
    body = []
    for model, form in dict.fromkeys((row["model"], row["form"]) for row in report["rows"]):
        rows = [of[model, form, name] for name in backends]
        losses = [f"{row['loss']:.4f}" if "loss" in row else "" for row in rows]
        # on a CPU that others use too, two runs do not agree
        times = [f"{row['token_ms']:.2f}" for row in rows] if report["device"] != "cpu" else []
        cells = [
            f"{model}, {rows[0]['parameters'] / 1e6:.1f}M",
            form if form == "float32" else f"{form} bits",
            f"{rows[0]['bytes'] / 1e6:.1f}",
        ]
        body.append([*cells, *losses, *times])
    head = ["model", "weights", "MB", *(f"loss, {name.upper()}" for name in backends)]
    head += [f"ms a token, {name.upper()}" for name in backends] if report["device"] != "cpu" else []
    return f"{report['device']}, computed in {report['rows'][0].get('dtype', 'float32')} (`{report['command']}`):\n\n{table(head, body)}"


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


def trained_pair() -> str | None:
    """What a trained draft gains on each device."""
    return "\n\n".join(_trained_pair(report) for report in reports("trained_pair").values()) or None


def _trained_pair(report: Row) -> str:
    body = [
        [
            str(row["rows"]),
            "greedy" if row["temperature"] == 0 else f"temperature {row['temperature']:g}",
            str(row["ahead"]),
            f"{row['right']:.0%}",
            f"{row['tokens_per_second_alone']:,.0f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['tokens_per_second'] / row['tokens_per_second_alone']:.2f}",
        ]
        for row in report["rows"]
    ]
    head = ["texts at once", "choice", "tokens ahead", "guesses right", "tokens/s alone", "with draft", "times as fast"]
    first, form, loss = report["rows"][0], report["form"], report["validation"]
    sizes = (
        f"{form[name]['size']}, {first[count] / 1e6:.0f}M, loss {loss[name]:.2f}"
        for name, count in (("target", "parameters"), ("draft", "draft_parameters"))
    )
    trained = f"{form['training']['steps']} steps of {form['training']['batch_size']} x {form['training']['seq_len']} tokens"
    intro = f"Model {' and draft '.join(sizes)}, both trained for {trained} of Python's standard library"
    where = f"{report['device']}, {first['dtype']}, {first['backend'].upper()} {report['versions'][first['backend']]}"
    return f"{intro} ({where}; `{report['command']}`):\n\n{table(head, body)}"


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


PARTS: dict[str, Callable[[], str | None]] = {
    "quantized": quantized,
    "sampling": sampling,
    "speculation": speculation,
    "trained-pair": trained_pair,
    "decode": decode,
}
