"""Pairs of answers -> a token file with a mask: two documents each, 2i with the better answer and 2i + 1 with the worse one.

Both documents begin with the same ids, those of the question, and of both the answer with the token that ends it is trained. A pair that
does not fit into a row is dropped whole: answers cut to different lengths would be another comparison. Packing never parts the two
(packing.py), so that the loss of a pair needs one row alone.
"""

import os
from collections.abc import Iterable, Iterator

import numpy as np

from smedjan_common.data.chats import ChatCut, Unit, encode_or_drop, manifest_notes, write_units
from smedjan_common.errors import TemplateError
from smedjan_common.text.conversations import Dropped
from smedjan_common.text.pairs import Pair, pairs
from smedjan_common.text.sources import Source
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.tokenizer.chat_template import ChatTemplate

Encoded = tuple[np.ndarray, np.ndarray]  # ids int32 [n], which are trained bool [n]


def prepare_pairs(
    sources: Iterable[Source],
    output: str | os.PathLike,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    cut: ChatCut,
    val_output: str | os.PathLike | None = None,
    val_fraction: float = 0.0,
) -> Dropped:
    """Write the token file, and that of the part that is held out by a hash of each question; gives what was dropped.

    cut.most: tokens of both documents together. Raises DataError where a row is wrong, too many are useless or none is left,
    TemplateError, OSError; nothing half-written is left.
    """
    dropped = Dropped()

    def units() -> Iterator[Unit]:
        for pair in pairs(sources, dropped):
            if documents := _fitted(tokenizer, template, pair, cut.most, dropped):
                yield Unit(pair.chosen.key, documents)

    write_units(units(), dropped, output, tokenizer, manifest_notes("pairs", template, cut), val_output, val_fraction)
    return dropped


def _fitted(tokenizer: Tokenizer, template: ChatTemplate, pair: Pair, most: int, dropped: Dropped) -> list[Encoded] | None:
    """Both documents; None where the pair is dropped."""
    place, documents = pair.chosen.place, []
    for side in pair:
        if (encoded := encode_or_drop(tokenizer, template, side, dropped)) is None:
            return None
        documents.append(encoded)
    (chosen, chosen_mask), (rejected, _) = documents
    if np.array_equal(chosen, rejected):
        dropped.add("the two answers are the same", place)
        return None
    question = int(np.argmax(chosen_mask))
    if not np.array_equal(chosen[:question], rejected[:question]):
        why = "It writes the question in another way before each of its two answers, so that they cannot be compared."
        raise TemplateError(f"{place}: the template {template.name} is not for pairs.", why, "Name another: chatml, say.")
    if (total := len(chosen) + len(rejected)) > most:
        dropped.add(f"both answers with their question longer than {most} tokens", place, f"{total} tokens")
        return None
    return documents
