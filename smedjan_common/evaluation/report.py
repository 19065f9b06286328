"""What an evaluation found: as a dictionary for JSON, and as lines to read."""

from collections.abc import Iterator, Sequence
from typing import Any

from smedjan_common.evaluation.choices import Result
from smedjan_common.inference.tally import Tally
from smedjan_common.reporting.console import counted

# name in JSON -> attribute of Tally
FIGURES = {
    "bits_per_byte": "bits_per_byte",
    "bits_per_byte_stderr": "bits_per_byte_error",
    "bits_per_byte_with_end_of_text": "bits_per_byte_with_ends",
    "loss": "loss",
    "loss_stderr": "loss_error",
    "loss_with_end_of_text": "loss_with_ends",
    "perplexity": "perplexity",
    "word_perplexity": "word_perplexity",
    "nats": "nats",
    "end_of_text_nats": "end_nats",
    "documents": "documents",
    "tokens": "tokens",
    "end_of_text_tokens": "ends",
    "bytes": "bytes",
    "words": "words",
}


def text_row(name: str, tally: Tally) -> dict[str, Any]:
    """Of one --dataset."""
    return {"dataset": name} | {key: getattr(tally, attribute) for key, attribute in FIGURES.items()}


def task_row(result: Result) -> dict[str, Any]:
    """Of one task."""
    task, answers = result.task, result.answers
    return {
        "task": task.name,
        "group": task.group,
        "kind": task.kind,
        "items": len(task.items),
        "shots": task.shots,
        "chance": task.chance,
        "figure": result.figure,
        "centred": result.centred,
        "figures": {name: {"value": value, "stderr": error} for name, (value, error) in result.figures.items()},
        "seams_moved": sum(answer.moved > 0 for answer in answers),
        "contexts_cut": sum(answer.cut > 0 for answer in answers),
    }


def answer_rows(result: Result) -> Iterator[dict[str, Any]]:
    """Of each item, what the model made of it."""
    for number, answer in enumerate(result.answers):
        item = answer.item
        yield {
            "task": result.task.name,
            "number": number,
            "where": item.where,
            "contexts": item.contexts,
            "options": item.options,
            "gold": item.gold,
            "right": answer.right,
            "logprobs": answer.logprobs,
            "chosen": answer.chosen,
            "text": answer.text,
        }


def groups(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each group of several tasks the mean of the centred scores; of DCLM's 22 tasks that is CORE."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row["group"]:
            found.setdefault(row["group"], []).append(row["centred"])
    return {name: {"tasks": len(values), "centred": sum(values) / len(values)} for name, values in found.items() if len(values) > 1}


def text_lines(row: dict[str, Any]) -> str:
    """Four lines."""
    sizes = (
        counted(row[key], noun) for key, noun in (("documents", "document"), ("tokens", "token"), ("bytes", "byte"), ("words", "word"))
    )
    return "\n".join(
        (
            f"{row['dataset']}: {', '.join(sizes)}",
            f"  bits per byte   {_number(row, 'bits_per_byte')}   with the ends of texts {_number(row, 'bits_per_byte_with_end_of_text')}",
            f"  loss            {_number(row, 'loss')}   with the ends of texts {_number(row, 'loss_with_end_of_text')} (nats per token)",
            f"  perplexity      {_short(row['perplexity'])} a token, {_short(row['word_perplexity'])} a word",
        )
    )


def task_lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line each, in columns, and one for each group."""
    width = max((len(row["task"]) for row in rows), default=0)
    for row in rows:
        shown = [row["figure"]] if row["group"] else row["figures"]
        figures = "  ".join(f"{name} {_with_error(*row['figures'][name].values())}" for name in shown)
        about = [counted(row["items"], "item"), f"chance {row['chance']:.3g}"]
        about += [counted(row["shots"], "example")] if row["shots"] else []
        about += [f"{row['contexts_cut']:,} longer than the context"] if row["contexts_cut"] else []
        yield f"{row['task']:<{width}}  {figures}  ({', '.join(about)})"
    for name, group in groups(rows).items():
        yield f"{name}: mean of {counted(group['tasks'], 'task')}, 0 is guessing and 1 all right: {group['centred']:.4f}"


def harness_lines(found: dict[str, Any]) -> Iterator[str]:
    """A line for each task of lm-evaluation-harness, its figures by their names there."""
    for task, row in found.get("results", {}).items():
        values = {name.removesuffix(",none"): value for name, value in row.items() if isinstance(value, int | float)}
        errors = {name.replace("_stderr", "", 1): value for name, value in values.items() if "_stderr" in name}
        figures = (f"{name} {_with_error(value, errors.get(name))}" for name, value in values.items() if "_stderr" not in name)
        yield f"{task}  {'  '.join(figures)}"


def _number(row: dict[str, Any], key: str) -> str:
    value = row[key]
    return "none" if value is None else _with_error(value, row.get(f"{key}_stderr"))


def _with_error(value: float, error: float | None) -> str:
    return f"{_short(value)} ± {_short(error)}" if error is not None else _short(value)


def _short(value: float | None) -> str:
    if value is None:
        return "none"
    return f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}" if abs(value) < 1e7 else f"{value:.3g}"
