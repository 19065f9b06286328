"""Questions with known answers, a JSON object a line, in the form that DCLM and nanochat use; the fields say which kind one is.

    kind                fields                                       right where
    multiple_choice     query, choices [text, …], gold               the choice `gold` is the most probable
    schema              context_options [text, …], continuation, gold  the continuation is most probable after the context `gold`
    language_modeling   context, continuation                        each token of the continuation is the most probable one (cloze)
    generate            prompt, answer (a text or several)           greedy generation gives an answer, white space around it aside

`context`, `question` and `prompt` are other names of `query`; `options` of `choices`; `target` of `answer`; `answer` and `label` of
`gold`, which is the number of the choice from 0, its letter, or its text. Other fields are not looked at.

Few-shot examples stand before the question, each with its right answer and an empty line after it.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smedjan_common.errors import DataError

QUERY = ("query", "context", "question", "prompt")
CHOICES = ("choices", "options")
GOLD = ("gold", "answer", "label")
ANSWER = ("answer", "target", "answers")
KINDS = ("multiple_choice", "schema", "language_modeling", "generate")
FORMS = "A line has query, choices and gold; context_options, continuation and gold; context and continuation; or prompt and answer."
MAX_OPTIONS = 256


@dataclass(frozen=True)
class Item:
    """contexts: one, of a schema several. options: what may follow; of `generate` the answers. gold: which of them is right."""

    kind: str
    contexts: tuple[str, ...]
    options: tuple[str, ...]
    gold: int = 0
    where: str = ""

    @property
    def chance(self) -> float:
        """How often guessing is right."""
        count = max(len(self.contexts), len(self.options)) if self.kind in ("multiple_choice", "schema") else 0
        return 1 / count if count else 0.0

    def shown(self, delimiter: str | None) -> str:
        """As an example: the question and its right answer."""
        if self.kind == "schema":
            return joined(self.contexts[self.gold], self.options[0], delimiter)
        query = self.contexts[0] if self.kind == "multiple_choice" else self.contexts[0].strip()
        return joined(query, self.options[self.gold], delimiter)


def joined(context: str, continuation: str, delimiter: str | None) -> str:
    """The text of both. delimiter: None is a space where neither has one at the join."""
    return context + between(context, continuation, delimiter) + continuation


def between(context: str, continuation: str, delimiter: str | None) -> str:
    """What stands at the join."""
    if delimiter is not None:
        return delimiter
    return "" if not context or context[-1:].isspace() or continuation[:1].isspace() else " "


def with_examples(examples: Sequence[Item], text: str, delimiter: str | None) -> str:
    """`text` after examples."""
    return "".join(f"{example.shown(delimiter)}\n\n" for example in examples) + text


def read_items(path: str | Path) -> Iterator[Item]:
    """The items of a JSONL file, all of one kind. Raises DataError, which names the file and line; OSError."""
    kind, number = "", 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                item = parse_item(line, f"{path}:{number}")
                if kind and item.kind != kind:
                    why = f"The lines before are {kind}, this one is {item.kind}."
                    raise DataError(f"{item.where} is of another kind.", why, "Keep each kind in a file of its own.")
                kind = item.kind
                yield item
    if not kind:
        raise DataError(f"{str(path)!r} has no items.", f"{number} lines were read." if number else "It is empty.", FORMS)


def parse_item(line: bytes, where: str) -> Item:
    """One line. Raises DataError."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8.", f"Byte {error.start} of the line is no text.", "Convert the file.") from None
    except (ValueError, RecursionError) as error:
        why = f"{error}." if isinstance(error, ValueError) else "It is nested too deeply."
        raise DataError(f"{where} is not JSON.", why, "Each line is one JSON object; correct or remove the line.") from None
    if not isinstance(record, dict):
        raise DataError(f"{where} is no JSON object.", f"It is {json.dumps(record)[:60]}.", FORMS)
    return _item(record, where)


def _item(record: dict[str, Any], where: str) -> Item:
    if "context_options" in record:
        contexts = _texts(record, ("context_options",), where)
        return Item("schema", contexts, (_text(record, ("continuation",), where),), _gold(record, contexts, where), where)
    if _name(record, CHOICES):
        options = _texts(record, CHOICES, where)
        return Item("multiple_choice", (_text(record, QUERY, where, empty=True),), options, _gold(record, options, where), where)
    if "continuation" in record:
        return Item("language_modeling", (_text(record, QUERY, where, empty=True),), (_text(record, ("continuation",), where),), 0, where)
    if _name(record, ANSWER):
        name = _name(record, ANSWER)
        answers = _texts(record, ANSWER, where, least=1) if isinstance(record[name], list) else (_text(record, ANSWER, where),)
        return Item("generate", (_text(record, QUERY, where),), answers, 0, where)
    raise DataError(f"{where} is no question of a known kind.", f"Its fields are {', '.join(map(repr, record)) or 'none'}.", FORMS)


def _name(record: dict[str, Any], names: Sequence[str]) -> str:
    return next((name for name in names if record.get(name) is not None), "")


def _text(record: dict[str, Any], names: Sequence[str], where: str, empty: bool = False) -> str:
    name = _name(record, names)
    if not name:
        raise DataError(f"{where} lacks {names[0]!r}.", f"It has {', '.join(map(repr, record))}.", FORMS)
    return _as_text(record[name], name, where, empty)


def _as_text(value: Any, name: str, where: str, empty: bool = False) -> str:
    value = str(value) if type(value) in (int, float) else value
    if not isinstance(value, str) or not (value.strip() or empty):
        raise DataError(f"{where} has no text in {name!r}.", f"It is {json.dumps(value)[:60]}.", "Correct or remove the line.")
    return value


def _texts(record: dict[str, Any], names: Sequence[str], where: str, least: int = 2) -> tuple[str, ...]:
    name = _name(record, names)
    values = record[name]
    if isinstance(values, dict) and isinstance(values.get("text"), list):  # as ARC has them on the Hub: {"text": […], "label": […]}
        values = values["text"]
    if not isinstance(values, list) or not least <= len(values) <= MAX_OPTIONS:
        many = len(values) if isinstance(values, list) else "no list of"
        raise DataError(f"{where} has {many} {name}.", f"There must be {least} to {MAX_OPTIONS} of them.", "Correct or remove the line.")
    return tuple(_as_text(value, name, where) for value in values)


def _gold(record: dict[str, Any], options: Sequence[str], where: str) -> int:
    name = _name(record, GOLD)
    if not name:
        raise DataError(
            f"{where} does not say which option is right.", f"It has {', '.join(map(repr, record))}.", 'Add "gold": its number.'
        )
    value, number = record[name], -1
    if type(value) is int:
        number = value
    elif isinstance(value, str):
        if options.count(value) == 1:
            number = options.index(value)
        elif re.fullmatch("[0-9]{1,9}", value.strip()):
            number = int(value)
        elif re.fullmatch("[A-Za-z]", value.strip()):
            number = ord(value.strip().upper()) - ord("A")
    if not 0 <= number < len(options):
        why = f"{name!r} is {json.dumps(value)[:60]}, and there are {len(options)} options."
        raise DataError(f"{where} names no option as the right one.", why, "Give its number, from 0.")
    return number
