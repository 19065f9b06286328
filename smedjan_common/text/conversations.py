"""Conversations from JSON lines, arrays of JSON and Parquet, whatever kind of rows they are (talk_kinds.py).

Every row is looked at, since one that is read as another kind would be misread without a word. A row that is wrong is an error with file
and line. A row that teaches nothing is dropped, counted by its reason, and the first of each reason are shown.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from smedjan_common.errors import DataError
from smedjan_common.text.blocks import blocks
from smedjan_common.text.documents import objects
from smedjan_common.text.rows import parquet_rows
from smedjan_common.text.sources import Source
from smedjan_common.text.talk_kinds import ASSISTANT, KINDS, Said, TalkKind, UselessRowError, WrongRowError, kind_of_row

_SHOWN = 3  # dropped rows of each reason
_FIX = "Correct the row, or leave it out."


class Talk(NamedTuple):
    """A conversation. messages: {"role", "content"}; trained: of each assistant message whether it counts; place: file and line; key: 64
    bits of a hash of the row, by which it is held out."""

    messages: list[dict[str, Any]]
    trained: list[bool]
    place: str
    key: int


class Dropped:
    """The rows that teach nothing, by reason. `rows`: all that were read."""

    def __init__(self) -> None:
        self.rows = 0
        self.counts: Counter[str] = Counter()
        self._first: dict[str, list[str]] = {}

    def add(self, reason: str, place: str, text: str = "") -> None:
        """One more. text: the beginning of what it says."""
        self.counts[reason] += 1
        shown = self._first.setdefault(reason, [])
        if len(shown) < _SHOWN:
            shown.append(f"{place}: {text}" if text else place)

    def lines(self) -> list[str]:
        """A line for each reason, and below it the first rows."""
        lines = []
        for reason, count in self.counts.most_common():
            lines += [f"{count} of {self.rows} rows dropped: {reason}.", *(f"    {one}" for one in self._first[reason])]
        return lines

    def check(self, most: float) -> None:
        """Raises DataError where more than the part `most` of the rows is dropped."""
        total = self.counts.total()
        if total and total > most * self.rows:
            what = f"{total} of {self.rows} rows would be dropped, more than --max-dropped {most:g} allows."
            raise DataError(
                what,
                "\n".join(("Why:", *self.lines())),
                f"Correct them, or allow it: --max-dropped {math.ceil(100 * total / self.rows) / 100}.",
            )


def conversations(sources: Iterable[Source], dropped: Dropped) -> Iterator[Talk]:
    """The conversations of all files, in order; what is left out is told to `dropped`. Raises DataError, OSError."""
    for place, said in useful_rows(sources, dropped, KINDS, _useful):
        trained = [trains for message, trains in zip(said.messages, said.trained, strict=True) if message["role"] == ASSISTANT]
        yield Talk(said.messages, trained, place, hash_of(said.messages))


def useful_rows(
    sources: Iterable[Source], dropped: Dropped, kinds: Sequence[TalkKind], useful: Callable[[Any], Any]
) -> Iterator[tuple[str, Any]]:
    """(file and line, what it says) of the rows of all files that are of one of `kinds`, each file of one.

    useful: gives what a row says back, or raises UselessRowError; what is left out is told to `dropped`. Raises DataError, OSError.
    """
    for source in sources:
        kind: TalkKind | None = None
        for place, row in _rows(source, kinds):
            dropped.rows += 1
            kind = _same_kind(kind, row, place, kinds)
            assert kind.read
            try:
                said = useful(kind.read(row))
            except WrongRowError as error:
                raise DataError(f"{place} is no row of the kind {kind.name}.", str(error), _FIX) from None
            except UselessRowError as error:
                dropped.add(str(error), place, _beginning(row))
                continue
            yield place, said


def _rows(source: Source, kinds: Sequence[TalkKind]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, row)."""
    path = str(source.path)
    if source.kind == "parquet":
        for number, row in enumerate(parquet_rows(source.place)):
            yield f"{path}:{number}", row
    elif source.kind == "text":
        raise DataError(f"{path!r} is no file of conversations.", "It is text.", f"Give JSON lines, JSON or Parquet: {_readable(kinds)}.")
    else:
        for block in blocks([source], field=""):
            for number, row in objects(block, None, "strict"):
                yield f"{path}:{number}", row


def _same_kind(kind: TalkKind | None, row: dict[str, Any], place: str, kinds: Sequence[TalkKind]) -> TalkKind:
    """The kind of a row, which is that of its file so far. Raises DataError."""
    own = kind_of_row(row, kinds)
    if own is None:
        keys = ", ".join(map(repr, list(row)[:8])) or "no keys"
        raise DataError(f"{place} is of no kind that is known.", f"It has {keys}. Known are {_readable(kinds)}.", _FIX)
    if kind and own is not kind:
        raise DataError(f"{place} is of the kind {own.name}.", f"The rows before it are of the kind {kind.name}.", "Make two files of it.")
    if not own.read:
        raise DataError(f"{place} is of the kind {own.name}, which is not for this.", *own.refused.split(". ", 1))
    return own


def _readable(kinds: Sequence[TalkKind]) -> str:
    return ", ".join(kind.name for kind in kinds if kind.read)


def _useful(talk: Said) -> Said:
    """The talk, where it has answers to learn. Raises UselessRowError."""
    answers = [(message, trains) for message, trains in zip(talk.messages, talk.trained, strict=True) if message["role"] == ASSISTANT]
    if not answers:
        raise UselessRowError("no answer of an assistant")
    if any(not message["content"].strip() and "tool_calls" not in message for message, _ in answers):
        raise UselessRowError("an empty answer")
    if not any(trains for _, trains in answers):
        raise UselessRowError("no answer that is trained")
    return talk


def hash_of(messages: list[dict[str, Any]]) -> int:
    """64 bits by which what has these messages is held out."""
    text = json.dumps(messages, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _beginning(row: dict[str, Any]) -> str:
    text = json.dumps(row, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:79] + "…"
