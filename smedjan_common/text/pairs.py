"""Pairs of answers, of which one is better, from JSON lines, arrays of JSON and Parquet, whatever kind of rows they are (pair_kinds.py).

As with conversations: every row is looked at, one that is wrong is an error with file and line, one that teaches nothing is dropped and
counted by its reason.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from smedjan_common.text.conversations import Dropped, Talk, hash_of, useful_rows
from smedjan_common.text.pair_kinds import PAIR_KINDS, Preferred
from smedjan_common.text.sources import Source
from smedjan_common.text.talk_kinds import ASSISTANT, Said, UselessRowError


class Pair(NamedTuple):
    """Two conversations with one question. Of their answers those to the question are trained, the ones before it are not. Both have the
    place and the key of the question: pairs of one question are held out together."""

    chosen: Talk
    rejected: Talk


def pairs(sources: Iterable[Source], dropped: Dropped) -> Iterator[Pair]:
    """The pairs of all files, in order; what is left out is told to `dropped`. Raises DataError, OSError."""
    for place, said in useful_rows(sources, dropped, PAIR_KINDS, _useful):
        key = hash_of([message for message, trains in zip(*said.chosen, strict=True) if not trains])
        yield Pair(*(_talk(side, place, key) for side in said))


def _useful(said: Preferred) -> Preferred:
    """The pair, where both sides have answers to compare. Raises UselessRowError."""
    for side in said:
        answers = [message for message, trains in zip(*side, strict=True) if trains and message["role"] == ASSISTANT]
        if not answers:
            raise UselessRowError("no answer that is trained")
        if any(not message["content"].strip() and "tool_calls" not in message for message in answers):
            raise UselessRowError("an empty answer")
    return said


def _talk(side: Said, place: str, key: int) -> Talk:
    trained = [trains for message, trains in zip(*side, strict=True) if message["role"] == ASSISTANT]
    return Talk(side.messages, trained, place, key)
