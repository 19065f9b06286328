"""Tasks: questions of one kind with how they are asked; from a JSONL file, a folder of such files, or made on the spot (generated.py).

A folder is read as DCLM and nanochat lay theirs out: `core.yaml`, where it is there, names the files, how many examples stand before each
question and what is at the join; `eval_meta_data.csv` has the score of guessing, in percent. Without them each .jsonl below is a task.

Items are shuffled with Random(1337) and the first `limit` are taken; the examples of item i are drawn from the others with
Random(1234 + i). Both are what nanochat does, so the same questions are asked.
"""

import csv
import dataclasses
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smedjan_common.errors import ConfigError, DataError, near
from smedjan_common.evaluation import generated
from smedjan_common.evaluation.items import Item, read_items
from smedjan_common.nearby import beside

ORDER_SEED, EXAMPLES_SEED = 1337, 1234
CONFIG, BASELINES, DATA = "core.yaml", "eval_meta_data.csv", "eval_data"
FIGURES = {"multiple_choice": "accuracy per token", "schema": "accuracy", "language_modeling": "exact", "generate": "exact match"}


@dataclass(frozen=True)
class Task:
    """Questions in the order in which they are asked. shots: how many others stand before each as examples.

    delimiter: what stands between question and answer, None a space where there is none. chance: how often guessing is right, of 1.
    figure: the one of its figures that counts. group: what it is averaged with.
    """

    name: str
    items: Sequence[Item]
    shots: int = 0
    delimiter: str | None = None
    chance: float = 0.0
    figure: str = ""
    group: str = ""

    @property
    def kind(self) -> str:
        """Of its items."""
        return self.items[0].kind

    def examples(self, number: int) -> list[Item]:
        """The examples before question `number`; none of them is that question."""
        if not self.shots:
            return []
        others = [at for at in range(len(self.items)) if at != number]
        return [self.items[at] for at in random.Random(EXAMPLES_SEED + number).sample(others, self.shots)]


def find_tasks(names: Iterable[str], *, shots: int | None = None, limit: int = 0, seed: int = 0) -> list[Task]:
    """The tasks that `names` (of generated tasks, JSONL files, folders of them) stand for. limit: the most items of each, 0 all.

    shots: examples before each question; None is what the folder says, else none. Raises DataError, ConfigError, OSError.
    """
    found: list[Task] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            found += _folder(path, shots, limit)
        elif path.is_file():
            found.append(make_task(path.stem, list(read_items(path)), shots or 0, limit))
        elif name in (*generated.ROWS, generated.ALL):
            found += _generated(name, shots or 0, limit, seed)
        else:
            known = near(name, [*generated.ROWS, generated.ALL])
            raise DataError(f"There is no task, file or folder {name!r}.", beside(path) if "/" in name or "." in name else known, known)
    return found


def make_task(name: str, items: list[Item], shots: int, limit: int, **more: Any) -> Task:
    """Raises DataError where there are too few items to draw examples from."""
    asked = list(items)
    random.Random(ORDER_SEED).shuffle(asked)
    asked = asked[:limit] if limit else asked
    if shots >= len(asked):
        raise DataError(
            f"The task {name!r} has {len(asked)} items.", f"{shots} others are to stand before each.", f"Take --shots {len(asked) - 1}."
        )
    chance = sum(item.chance for item in asked) / len(asked)
    return Task(name, asked, shots, **{"chance": chance, **more})


def _generated(name: str, shots: int, limit: int, seed: int) -> list[Task]:
    rows = generated.ROWS if name == generated.ALL else {name: generated.ROWS[name]}
    return [
        make_task(
            f"{name} {size}",
            generated.make(name, size, limit or generated.ITEMS, seed),
            shots,
            0,
            delimiter="",
            figure="accuracy",
            group=name,
        )
        for name, row in rows.items()
        for size in row.sizes
    ]


def _folder(folder: Path, shots: int | None, limit: int) -> list[Task]:
    config = folder / CONFIG
    if config.is_file():
        return [_listed(folder, row, shots, limit) for row in _rows(config)]
    files = sorted(folder.rglob("*.jsonl"))
    if not files:
        raise DataError(f"There is no .jsonl file in {str(folder)!r}.", "", "Name a folder with questions, a JSON object a line.")
    baselines = _baselines(folder / BASELINES)
    tasks = []
    for path in files:
        name = path.stem
        given = {"chance": baselines[name]} if name in baselines else {}
        tasks.append(make_task(name, list(read_items(path)), shots or 0, limit, delimiter=" ", group=folder.name, **given))
    return [_as_core(task) for task in tasks]


def _listed(folder: Path, row: dict[str, Any], shots: int | None, limit: int) -> Task:
    """A task that core.yaml names."""
    name = row["label"]
    path = next((path for path in (folder / DATA / row["dataset_uri"], folder / row["dataset_uri"]) if path.is_file()), None)
    if path is None:
        missing = folder / DATA / row["dataset_uri"]
        raise DataError(
            f"There is no {str(missing)!r}.", f"{folder / CONFIG} names it for {name!r}.", "Add the file, or take it out there."
        )
    its = row.get("num_fewshot", [0])
    its = its[0] if isinstance(its, list) else its
    baselines = _baselines(folder / BASELINES)
    given = {"chance": baselines[name]} if name in baselines else {}
    task = make_task(
        name,
        list(read_items(path)),
        its if shots is None else shots,
        limit,
        delimiter=row.get("continuation_delimiter", " "),
        group=folder.name,
        **given,
    )
    if (kind := row.get("icl_task_type", task.kind)) != task.kind:
        why = f"{folder / CONFIG} says {kind}, its fields are those of {task.kind}."
        raise DataError(f"{str(path)!r} is of another kind.", why, "Correct one of them.")
    return _as_core(task)


def _as_core(task: Task) -> Task:
    return dataclasses.replace(task, figure=FIGURES[task.kind])


def _rows(config: Path) -> list[dict[str, Any]]:
    try:
        import yaml
    except ImportError:
        fix = "Install it: pip install PyYAML. Or take the file away: then each .jsonl is a task, and --shots says the examples."
        raise ConfigError(f"{config} cannot be read.", "PyYAML is not installed.", fix) from None
    try:
        rows = yaml.safe_load(config.read_text(encoding="utf-8"))["icl_tasks"]
        for row in rows:
            if not isinstance(row["label"], str) or not isinstance(row["dataset_uri"], str):
                raise TypeError
            _check_row(row, config)
        return rows
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, IndexError):
        why = "It has no list icl_tasks of tasks with a label and a dataset_uri."
        raise DataError(f"{config} does not say which tasks there are.", why, "Restore it from a good copy.") from None


def _check_row(row: dict[str, Any], config: Path) -> None:
    """Raises DataError for what else core.yaml says of a task, where it is of another kind than it must be."""
    shots, delimiter = row.get("num_fewshot", [0]), row.get("continuation_delimiter", " ")
    shots = shots[:1] if isinstance(shots, list) else [shots]
    wrong = "num_fewshot" if not shots or type(shots[0]) is not int or shots[0] < 0 else ""
    if wrong := wrong or ("" if isinstance(delimiter, str) else "continuation_delimiter"):
        why = f"It is {row[wrong]!r:.60}; the one is a number from 0, the other a text."
        raise DataError(f"{config} has a wrong {wrong} for {row['label']!r}.", why, "Correct it.")


def _baselines(file: Path) -> dict[str, float]:
    """The score of guessing by task, of 1."""
    if not file.is_file():
        return {}
    try:
        with open(file, encoding="utf-8", newline="") as table:
            found = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(table)}
            if not all(0 <= chance < 1 for chance in found.values()):
                raise ValueError
            return found
    except (KeyError, TypeError, ValueError, csv.Error):
        why = "It needs the columns 'Eval Task' and 'Random baseline', percents from 0 to under 100."
        raise DataError(f"{file} does not say what guessing scores.", why, "Restore it from a good copy, or take it away.") from None
