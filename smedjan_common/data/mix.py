"""Several token files into one by weight, document by document, no document twice.

Each file's documents come in a permuted order (order.py). The next document is always of the file that is furthest behind its weight in
tokens; the mixture ends when that file has no document left, or at the number of tokens that was asked for.
"""

import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from smedjan_common.data.mixture import check_same_tokenizer, shares
from smedjan_common.data.order import permute
from smedjan_common.data.token_file import TokenFile, TokenFileWriter
from smedjan_common.errors import DataError
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.tokenizer.arrays import gather

_TOKENS_AT_ONCE = 1 << 22


class Part(NamedTuple):
    """What one file gave: documents and tokens taken, and how many it has."""

    path: str
    weight: float
    documents: int
    tokens: int
    all_documents: int
    all_tokens: int


def mix(
    shards: Sequence[tuple[str | os.PathLike, float]],
    output: str | os.PathLike,
    *,
    tokens: int | None = None,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Part]:
    """Write the mixture to `output`. `tokens`: stop at the document that reaches so many. `tokenizer`: to count the bytes of text.

    Raises DataError for files of different tokenizers or without document offsets, OSError; nothing half-written is left.
    """
    files = [TokenFile.open(path) for path, _ in shards]
    weights = [weight for _, weight in shards]
    check_same_tokenizer(files)
    if masked := next((str(file.path) for file in files if file.mask is not None), None):
        why = "The mixture would not say which of its tokens are trained."
        raise DataError(f"{masked!r} holds conversations.", why, "Give the files to `smedjan sft --dataset` together.")
    shares(weights, 1 << 40)  # refuses weights that cannot be
    if tokenizer:
        files[0].check_tokenizer(tokenizer.hash)
    lengths = [_document_lengths(file) for file in files]
    orders = [
        permute(np.arange(len(length)), len(length), seed + number, 0) if len(length) else length for number, length in enumerate(lengths)
    ]
    turns = _turns([length[order] for length, order in zip(lengths, orders, strict=True)], weights, tokens)
    if not len(turns):
        raise DataError("There is nothing to mix.", "A file has no documents.", "Leave the empty file out.")
    manifest = {
        "sources": [{"path": str(file.path), "sha256": file.hash, "weight": weight} for file, weight in zip(files, weights, strict=True)]
    }
    manifest |= {key: files[0].manifest[key] for key in ("pattern", "eot_id", "bos_id") if key in files[0].manifest}
    manifest |= {"mixed_with_seed": seed} | ({} if tokenizer else {"bytes": None})
    with TokenFileWriter(output, files[0].vocab_size, files[0].tokenizer_hash, manifest) as writer:
        taken = _write(writer, files, lengths, orders, turns, tokenizer, progress)
    parts = zip(files, weights, taken, lengths, orders, strict=True)
    return [
        Part(str(file.path), weight, count, int(length[order[:count]].sum()), len(length), file.num_tokens)
        for file, weight, count, length, order in parts
    ]


def _document_lengths(file: TokenFile) -> np.ndarray:
    if file.documents is None:
        raise DataError(f"{str(file.path)!r} has no document offsets.", "", "Prepare it again: smedjan prepare.")
    return np.diff(np.append(file.documents.astype(np.int64), file.num_tokens))


def _turns(lengths: list[np.ndarray], weights: Sequence[float], tokens: int | None) -> np.ndarray:
    """Which file gives the next document, int32 [documents taken].

    The k-th document of a file is due when the file's tokens before it, divided by its weight, are fewest among the files: so merging
    these sorted numbers gives the turns.
    """
    due = [(np.cumsum(length) - length) / weight for length, weight in zip(lengths, weights, strict=True)]
    ends = [length.sum() / weight for length, weight in zip(lengths, weights, strict=True)]
    file = np.repeat(np.arange(len(due), dtype=np.int32), list(map(len, due)))
    when, size = np.concatenate(due), np.concatenate(lengths)
    order = np.lexsort((file, when))
    turns = file[order][when[order] < min(ends)]
    if tokens is not None:
        reached = np.cumsum(size[order][: len(turns)])
        turns = turns[: int(np.searchsorted(reached, tokens)) + 1]
    return turns


def _write(writer, files, lengths, orders, turns, tokenizer, progress) -> list[int]:
    """Copy the documents in the order of the turns; how many each file gave."""
    sizes = tokenizer.token_bytes() if tokenizer else None
    taken = [0] * len(files)
    step = max(1, _TOKENS_AT_ONCE // max(1, int(np.concatenate(lengths).mean())))
    for first in range(0, len(turns), step):
        turn = turns[first : first + step]
        length, pieces = np.empty(len(turn), np.int64), np.empty(len(turn), object)
        for number, file in enumerate(files):
            mine = np.flatnonzero(turn == number)
            documents = orders[number][taken[number] : taken[number] + len(mine)]
            taken[number] += len(mine)
            length[mine] = lengths[number][documents]
            tokens = gather(file.tokens, file.documents.astype(np.int64)[documents], length[mine])
            pieces[mine] = np.split(tokens, np.cumsum(length[mine])[:-1]) if len(mine) != 1 else [tokens]
        flat = np.concatenate(list(pieces))
        writer.append(flat, np.cumsum(length) - length, int(sizes[flat].sum()) if sizes is not None else 0)
        if progress:
            progress(min(first + step, len(turns)), len(turns))
    return taken
