"""Conversations -> a token file with a mask: one document each, and of each token whether it is trained.

Trained are the answers with the token that ends them, and nothing else: no header, no line break after the end. Ids are cut where an
answer begins and ends (tokenizer/chat_template.py), so that training sees the ids that generation will see. A conversation that does not
fit into the context is dropped or cut at its end: its second half would have no question.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from smedjan_common.data.token_file import TokenFileWriter
from smedjan_common.errors import DataError, TemplateError
from smedjan_common.text.conversations import Dropped, Talk, conversations
from smedjan_common.text.sources import Source
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.tokenizer.chat_template import REFUSED, ChatTemplate

TRAIN_ON = ("replies", "all")
TOO_LONG = ("drop", "truncate")
_HASH_RANGE = 1 << 64


class ChatCut(NamedTuple):
    """What of conversations becomes tokens. most: tokens of one; max_dropped: the part of the rows that may be useless."""

    most: int
    too_long: str = "drop"
    train_on: str = "replies"
    max_dropped: float = 0.05


def prepare_chats(
    sources: Iterable[Source],
    output: str | os.PathLike,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    cut: ChatCut,
    val_output: str | os.PathLike | None = None,
    val_fraction: float = 0.0,
) -> Dropped:
    """Write the token file, and that of the part that is held out by a hash of each row; gives what was dropped.

    Raises DataError where a row is wrong, too many are useless or none is left, TemplateError, OSError; nothing half-written is left.
    """
    dropped = Dropped()

    def units() -> Iterator[Unit]:
        for talk in conversations(sources, dropped):
            if fitting := _fitted(tokenizer, template, talk, cut, dropped):
                yield Unit(talk.key, [fitting])

    write_units(units(), dropped, output, tokenizer, manifest_notes("chats", template, cut), val_output, val_fraction)
    return dropped


class Unit(NamedTuple):
    """What is trained or held out together: its key, and of each document ids int32 [n] and which are trained, bool [n]."""

    key: int
    documents: list[tuple[np.ndarray, np.ndarray]]


def manifest_notes(kind: str, template: ChatTemplate, cut: ChatCut) -> dict[str, Any]:
    """What the manifest of a token file with a mask says of how it was made. kind: "chats" or "pairs"."""
    source = template.source()
    return {"kind": kind, "template": template.name, "template_sha256": source.sha256 if source else None, **cut._asdict()}


def write_units(
    units: Iterable[Unit],
    dropped: Dropped,
    output: str | os.PathLike,
    tokenizer: Tokenizer,
    notes: dict[str, Any],
    val_output: str | os.PathLike | None,
    val_fraction: float,
) -> None:
    """Write a token file with a mask, and that of the part that is held out by the keys of units. Raises DataError where too many rows are
    dropped or none is left; nothing half-written is left."""
    sizes = tokenizer.token_bytes()
    with contextlib.ExitStack() as stack:
        paths = [output, *([val_output] if val_output else [])]
        writers = [
            stack.enter_context(TokenFileWriter(path, tokenizer.vocab_size, tokenizer.hash, dict(notes), masked=True)) for path in paths
        ]
        for unit in units:
            side = 1 if val_output and unit.key < val_fraction * _HASH_RANGE else 0
            for ids, mask in unit.documents:
                writers[side].append(ids, np.zeros(1, np.int64), int(sizes[ids].sum()), mask)
        dropped.check(notes["max_dropped"])
        if not writers[0].num_documents:
            what = {"chats": "conversation", "pairs": "pair of answers"}[notes["kind"]]
            why = f"{dropped.rows} rows were read, {dropped.counts.total()} dropped, the rest is held out to validate on."
            raise DataError(f"No {what} is left to train on.", why, "Give more, or --val-fraction 0.")
        for writer in writers:
            writer.manifest["dropped"] = dict(dropped.counts)


def encode_talk(tokenizer: Tokenizer, template: ChatTemplate, talk: Talk, train_on: str = "replies") -> tuple[np.ndarray, np.ndarray]:
    """(ids int32 [n], which are trained bool [n]) of a conversation. Raises TemplateError where it is not known what is an answer.

    train_on: "replies", or "all", which leaves out the first token, that nothing comes before, and the answers that the row leaves out.
    """
    ids, spans = template.encode_turns(tokenizer, talk.messages)
    if len(spans) != len(talk.trained):
        why = f"It has {len(talk.trained)} answers, the text of the template {len(spans)}."
        raise TemplateError(f"The template {template.name} does not show the answers of {talk.place}.", why, "Name another: chatml, say.")
    mask = np.full(len(ids), train_on == "all")
    for span, trains in zip(spans, talk.trained, strict=True):
        mask[span.start : span.stop] = trains
    mask[:1] = False
    return np.array(ids, np.int32), mask


def encode_or_drop(
    tokenizer: Tokenizer, template: ChatTemplate, talk: Talk, dropped: Dropped, train_on: str = "replies"
) -> tuple[np.ndarray, np.ndarray] | None:
    """As encode_talk; None where the template refuses the messages, which is told to `dropped`. Raises TemplateError with the place."""
    try:
        return encode_talk(tokenizer, template, talk, train_on)
    except TemplateError as error:
        if error.case != REFUSED:
            raise TemplateError(f"{talk.place}: {error.what}", error.why, error.fix) from None
        dropped.add("the template refuses it", talk.place, error.what)
        return None


def _fitted(
    tokenizer: Tokenizer, template: ChatTemplate, talk: Talk, cut: ChatCut, dropped: Dropped
) -> tuple[np.ndarray, np.ndarray] | None:
    """Ids and mask of a conversation of at most `most` tokens; None where it is dropped."""
    if (encoded := encode_or_drop(tokenizer, template, talk, dropped, cut.train_on)) is None:
        return None
    ids, mask = encoded
    if len(ids) > cut.most and cut.too_long == "drop":
        dropped.add(f"longer than {cut.most} tokens", talk.place, f"{len(ids)} tokens")
        return None
    if not mask[: cut.most].any():
        dropped.add(f"no answer within {cut.most} tokens", talk.place, f"{len(ids)} tokens")
        return None
    return ids[: cut.most], mask[: cut.most]
