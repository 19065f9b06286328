"""`smedjan eval`, and the body of `python -m smedjan_jax.eval` and `python -m smedjan_mlx.eval`."""

import functools
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import arg

from smedjan_common.command_line import NAMELESS, parse
from smedjan_common.errors import ConfigError, run_command
from smedjan_common.files.atomic_file import atomic_file, write_atomically
from smedjan_common.optional import MaybeInt, MaybeStr
from smedjan_common.run.signals import interrupt_ends_at_once

if TYPE_CHECKING:
    from smedjan_common.inference.opened import Load, OpenModel

EXAMPLES = (
    "smedjan eval runs/mine",
    "smedjan eval runs/mine held-out.txt other/ --stride 256",
    "smedjan eval runs/mine --tasks generated questions.jsonl --shots 2 --json",
)


@dataclass(frozen=True)
class EvalFlags:
    """Measure a trained model: loss, perplexity and bits per byte on texts, and how many questions it answers right."""

    checkpoint: Annotated[str, arg(metavar="RUN"), NAMELESS]
    """A run folder (its newest weights), or a checkpoint in one: step-*/ or final/. `smedjan eval RUN` is the same."""
    dataset: Annotated[
        tuple[str, ...], arg(metavar="FILE ...", help_behavior_hint="(default: what the run validates on, without questions)"), NAMELESS
    ] = ()
    """Text files, JSONL, directories and token files to measure the loss on, each by itself. `smedjan eval RUN FILE` is the same."""
    tasks: Annotated[tuple[str, ...], arg(metavar="TASK ...", help_behavior_hint="")] = ()
    """Questions: JSONL files, folders of them, or generated: sums, copy, reverse, brackets, recall, induction; or `generated` for all."""
    lm_eval: Annotated[tuple[str, ...], arg(metavar="TASK ...", help_behavior_hint="")] = ()
    """Tasks of lm-evaluation-harness (pip install 'smedjan[lm-eval]'): names that it knows, YAML files, folders of them."""
    shots: Annotated[MaybeInt, arg(metavar="INT", help_behavior_hint="(default: what a folder of tasks says, else 0)")] = None
    """How many other questions with their answers stand before each question."""
    limit: int = 0
    """The most documents of each text and questions of each task. 0: all, and 200 of each generated task."""
    context: int = 0
    """The most tokens that the model sees at once. 0: as many as it was trained with."""
    stride: int = 0
    """Windows of long documents lie this many tokens apart: fewer give each token more context and take longer. 0: the context."""
    field: str = "text"
    """The field of JSON, or the column, that holds the text."""
    seed: int = 0
    """Of the generated questions."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print JSON."""
    output: Annotated[MaybeStr, arg(metavar="FILE", help_behavior_hint="")] = None
    """Write the same JSON to a file."""
    answers: Annotated[MaybeStr, arg(metavar="FILE", help_behavior_hint="")] = None
    """Write what the model made of each question to a JSONL file."""
    batch_tokens: Annotated[int, arg(help_behavior_hint="(default: by the device)")] = 0
    """Tokens that are computed at once."""
    ema: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Take the moving average of the weights that a step of `smedjan train --ema` keeps; final/ of such a run is the average."""
    dtype: Annotated[str, arg(metavar="auto|float32|bfloat16")] = "float32"
    """Precision of the computation."""
    backend: Annotated[str, arg(metavar="auto|jax|mlx")] = "auto"
    """The framework. auto: MLX on Apple Silicon, else JAX."""


def main(argv: list[str]) -> int:
    """`smedjan eval`: hand over to the backend's own program."""
    from smedjan_common.commands.backends import delegate

    return delegate("eval", argv)


def run(name: str, load: "Load", argv: list[str] | None = None) -> int:
    """Parse and evaluate with the backend `name`; returns the exit code."""

    def body() -> int:
        flags = parse(EvalFlags, "smedjan eval", argv, *EXAMPLES)
        with interrupt_ends_at_once():
            return _eval(name, load, flags)

    return run_command(body)


def _eval(name: str, load: "Load", flags: EvalFlags) -> int:
    from smedjan_common.commands.backends import check_backend
    from smedjan_common.evaluation.harness import model_class
    from smedjan_common.evaluation.tasks import find_tasks
    from smedjan_common.evaluation.texts import find_texts
    from smedjan_common.inference.opened import OpenModel

    check_backend(name, flags.backend)
    opened = OpenModel(flags.checkpoint, ema=flags.ema)
    context, stride = _windows(flags, opened.model.context_length)
    names = flags.dataset or (() if flags.tasks or flags.lm_eval else _validation(opened.info.path))
    texts = find_texts(names, opened.tokenizer, flags.field)
    tasks = find_tasks(flags.tasks, shots=flags.shots, limit=flags.limit, seed=flags.seed)
    if flags.lm_eval:
        model_class()  # whether it is installed is told before weights are read
    opened.use(name, load, flags.dtype)
    started = time.monotonic()
    found = _measure(flags, opened, context, stride, texts, tasks)
    _report(flags, _about(opened, context, stride) | {"seconds": round(time.monotonic() - started, 3)} | found)
    return 0


def _about(opened: "OpenModel", context: int, stride: int) -> dict[str, Any]:
    """What was measured, and how."""
    device = opened.backend.describe()
    return {
        "model": opened.name,
        "checkpoint": str(opened.info.path),
        "step": getattr(opened.info, "step", None),
        "averaged": opened.averaged,
        "tokenizer_hash": opened.tokenizer.hash,
        "backend": device.backend,
        "device": device.name,
        "versions": device.versions,
        "dtype": opened.dtype,
        "context": context,
        "stride": stride,
    }


def _windows(flags: EvalFlags, trained: int) -> tuple[int, int]:
    """(context, stride) in tokens. Raises ConfigError for numbers that make no windows."""
    for name in ("limit", "context", "stride", "batch_tokens", "shots"):
        if (getattr(flags, name) or 0) < 0:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(flags, name)}.", "It counts something.", "Take 0 or more.")
    context = flags.context or trained
    if flags.stride > context:
        why = f"The context is {context} tokens, and what lies between two windows would not be scored."
        raise ConfigError(f"--stride is {flags.stride}.", why, f"Take 1 to {context}.")
    return context, flags.stride or context


def _validation(checkpoint: Path) -> tuple[str, ...]:
    """The token files that the run of a checkpoint validates on. Raises ConfigError where there are none."""
    for folder in (checkpoint.parent, checkpoint):
        try:
            data = json.loads((folder / "config.json").read_text(encoding="utf-8"))["val_dataset"]
            files = tuple(str(folder / file["path"]) for file in data.get("files", [data]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        if files and all(map(os.path.isfile, files)):
            return files
    why = "The run has no token file to validate on, or it is not there any more."
    raise ConfigError("There is nothing to evaluate on.", why, "Name texts with --dataset, or questions with --tasks.")


def _measure(flags: EvalFlags, opened: "OpenModel", context: int, stride: int, texts: list, tasks: list) -> dict[str, Any]:
    from smedjan_common.evaluation.answers import write_answers
    from smedjan_common.evaluation.choices import answer_task
    from smedjan_common.evaluation.harness import run_harness
    from smedjan_common.evaluation.report import answer_rows, groups, task_row, text_row
    from smedjan_common.evaluation.texts import score_text
    from smedjan_common.inference.scoring import Scorer
    from smedjan_common.reporting.progress import progress_bar

    scorer = Scorer(opened.backend, opened.params, context, flags.batch_tokens or None)
    found: dict[str, Any] = {"texts": [], "tasks": []}
    lines: list[str] = []
    with progress_bar("steps") as show:
        for text in texts:
            tally = score_text(text, scorer, opened.tokenizer, stride=stride, field=flags.field, limit=flags.limit, show=show)
            found["texts"].append(text_row(text.name, tally))
        for task in tasks:
            told = functools.partial(show, task.name)
            if task.kind == "generate":
                result = write_answers(task, opened, told)
            else:
                result = answer_task(task, scorer, opened.tokenizer, told)
            found["tasks"].append(task_row(result))
            lines += [json.dumps(row, ensure_ascii=False) for row in answer_rows(result)] if flags.answers else []
    if flags.lm_eval:
        found["lm_eval"] = run_harness(opened, scorer, flags.lm_eval, shots=flags.shots, limit=flags.limit, seed=flags.seed)
    if flags.answers:
        with atomic_file(flags.answers) as file:
            file.write("".join(f"{line}\n" for line in lines).encode("utf-8", "replace"))
    return found | {"groups": groups(found["tasks"])}


def _report(flags: EvalFlags, found: dict[str, Any]) -> None:
    from smedjan_common.evaluation.report import harness_lines, task_lines, text_lines

    whole = json.dumps(found, indent=1)
    if flags.output:
        write_atomically(Path(flags.output), f"{whole}\n".encode())
    if flags.json:
        print(whole)
        return
    where = f"{found['backend']}, {found['dtype']}, on {found['device']}"
    where += ", the average of its weights" if found["averaged"] else ""
    print(f"{found['checkpoint']} ({where}; context {found['context']}, stride {found['stride']})")
    for row in found["texts"]:
        print(text_lines(row))
    for line in (*task_lines(found["tasks"]), *harness_lines(found.get("lm_eval", {}))):
        print(line)
    sys.stdout.flush()
