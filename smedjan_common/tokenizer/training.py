"""Training a vocabulary: count words (here or in processes), learn merges, number the tokens.

Ids: the 256 bytes in `byte_order`, then one per merge, then the special tokens, so that ordinary ids are tiktoken ranks too.
"""

import os
from collections.abc import Callable, Iterable, Sequence

from smedjan_common.errors import DataError, near, notice
from smedjan_common.executors import start
from smedjan_common.text.blocks import blocks, bundles
from smedjan_common.text.sources import find, much, total_size
from smedjan_common.tokenizer import patterns
from smedjan_common.tokenizer.bytelevel import BYTE_ORDERS
from smedjan_common.tokenizer.merge import learn_merges
from smedjan_common.tokenizer.vocabulary import MAX_IDS, Vocabulary, as_bytes, special_problem
from smedjan_common.tokenizer.words import WordCounts, add


def train(
    count: Callable[[patterns.Splitter], WordCounts],
    vocab_size: int,
    pattern: str,
    special_tokens: Sequence[str],
    progress: Callable[[str, int, int], None] | None,
    min_count: int,
    byte_order: str,
) -> Vocabulary:
    """The vocabulary learnt from what `count` counts. Raises DataError."""
    specials = list(dict.fromkeys(special_tokens))
    check_size(vocab_size, len(specials))
    _check(byte_order)
    expression = patterns.resolve(pattern)
    splitter = patterns.Splitter(expression)
    _check_specials(specials, splitter)
    counts = count(splitter)
    if not len(counts.counts):
        raise DataError("There is nothing to learn from.", "All inputs are empty.", "Give some text.")
    if counts.dropped:
        notice(f"{counts.dropped} distinct words seen once were left out to save memory; merges may differ a little.")
    merging = (lambda done, total: progress("merge", done, total)) if progress else None
    order = BYTE_ORDERS[byte_order]
    pairs = learn_merges(counts, order, vocab_size - 256 - len(specials), min_count, merging)
    names = [bytes([byte]) for byte in order]
    merges = []
    for left, right in pairs:
        merges.append((names[left], names[right]))
        names.append(names[left] + names[right])
    assert len(set(names)) == len(names), "two merges made the same token"
    tokens = {token: number for number, token in enumerate(names)}
    return Vocabulary(tokens, merges, expression, {name: len(names) + i for i, name in enumerate(specials)})


def count_files(
    files: Iterable[str | os.PathLike],
    splitter: patterns.Splitter,
    processes: int | None = None,
    field: str = "text",
    errors: str = "strict",
    progress: Callable[[int, int], None] | None = None,
    executor: str = "local",
) -> WordCounts:
    """Words of all files, counted in processes; `progress(bytes done, bytes in all)`."""
    found = find(files, field=field)
    total, done = total_size(found), 0
    arguments = (splitter.expression, field, errors)
    with start(executor, "smedjan_common.tokenizer.words:WordCounter", arguments, processes, much(found)) as pool:
        for size in pool.map(bundles(blocks(found, splitter.known, field=field))):
            done += size
            if progress:
                progress(min(done, total), total)
        return add(pool.finish())


def check_size(vocab_size: int, num_specials: int = 1) -> None:
    """Raises DataError for a vocabulary that has no room for the bytes and the special tokens, or is too large."""
    least = 256 + num_specials
    if vocab_size < least:
        raise DataError(
            f"A vocabulary of {vocab_size} is too small.",
            f"There are 256 bytes and {num_specials} special token{'s' * (num_specials != 1)}.",
            f"Ask for at least {least}.",
        )
    if vocab_size > MAX_IDS:
        raise DataError(f"A vocabulary of {vocab_size} is too large.", f"The limit is {MAX_IDS}.", "Usual sizes are 8192 to 262144.")


def _check(byte_order: str) -> None:
    if byte_order not in BYTE_ORDERS:
        raise DataError(f"There is no byte order {byte_order!r}.", near(byte_order, BYTE_ORDERS), "Choose one of these.")


def _check_specials(names: list[str], splitter: patterns.Splitter) -> None:
    """Raises DataError for a name that a learnt token could be written as: a tokenizer.json could not hold both.

    Tokens are parts of words, so a name that the pattern cuts into several words is safe.
    """
    for name in names:
        why, token = special_problem(name), as_bytes(name)
        text = token.decode("utf-8", "replace").replace("\ufffd", "é")  # a part of a letter
        if not why and token and (len(token) == 1 or len(splitter.words(text)) == 1):
            why = "The text may give an ordinary token of that name, and a tokenizer keeps one id for a name."
        if why:
            raise DataError(f"--special {name!r} cannot name a special token.", why, f"Name it <|{name or 'name'}|>, say.")
