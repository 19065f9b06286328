"""Loss over texts: files, directories, JSON lines and token files, each document by itself.

Every token of a document is scored after the end-of-text token and what comes before it in the document, as far as the context reaches;
the end-of-text token after it is scored too, and kept apart. Bytes are counted in the text, not in tokens.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from smedjan_common.data.token_file import TokenFile, manifest_path
from smedjan_common.errors import DataError
from smedjan_common.inference.scoring import LOT, Scorer, beginning
from smedjan_common.inference.tally import Tally
from smedjan_common.remote.address import is_remote, shown
from smedjan_common.text.cuts import mend_surrogates
from smedjan_common.text.records import Reading
from smedjan_common.text.sources import Source, find, total_size

FLAG = "--dataset"
Progress = Callable[[str, int, int], None]  # (what, done, of how many)


@dataclass(frozen=True)
class Document:
    """ids [n]: the end-of-text token, the text's, and the end-of-text token again where `ended`."""

    ids: np.ndarray
    num_bytes: int
    words: int
    ended: bool


@dataclass(frozen=True)
class Text:
    """What --dataset names: one token file, or sources of text. sha256: of a token file."""

    name: str
    sources: list[Source]
    token_file: TokenFile | None = None

    @property
    def size(self) -> int:
        """Tokens of a token file, else bytes; 0 where it is not known."""
        return self.token_file.num_tokens if self.token_file else total_size(self.sources)

    def documents(self, tokenizer: Any, field: str) -> Iterator[Document]:
        """Those that are not empty."""
        if self.token_file:
            return _of_tokens(self.token_file, tokenizer)
        return _of_texts(self.sources, tokenizer, field)


def find_texts(names: Iterable[str], tokenizer: Any, field: str = "text") -> list[Text]:
    """What is there under each name. Raises DataError for what is not there, is no text, or was made with another tokenizer; OSError."""
    found = []
    for name in names:
        path = Path(name)
        if is_remote(name) and path.suffix != ".bin":
            found.append(Text(shown(name), find([name], FLAG, field)))
        elif path.suffix == ".bin" or manifest_path(path).is_file():
            token_file = TokenFile.open(name)
            token_file.check_tokenizer(tokenizer.hash)
            found.append(Text(shown(name) if is_remote(name) else name, [], token_file))
        else:
            found.append(Text(name, find([name], FLAG, field)))
    return found


def score_text(text: Text, scorer: Scorer, tokenizer: Any, *, stride: int | None, field: str, limit: int, show: Progress) -> Tally:
    """Sums over its documents; limit: the most of them, 0 all. Raises DataError where there is nothing to score."""
    tally, lot, before, done, waiting = Tally(), [], 0, 0, 0

    def flush() -> None:
        total, scored = sum(len(document.ids) - 1 for document in lot), 0

        def told(tokens: int) -> None:
            nonlocal scored
            scored += tokens
            show(text.name, min(before + (done - before) * scored // total, text.size), text.size)

        scorer.progress = told
        for document, logprobs in zip(lot, scorer.documents([document.ids for document in lot], stride), strict=True):
            of_text, end = (logprobs[:-1], float(logprobs[-1])) if document.ended else (logprobs, None)
            tally.add(of_text, document.num_bytes, document.words, end)
        lot.clear()

    for number, document in enumerate(text.documents(tokenizer, field)):
        if limit and number == limit:
            break
        lot.append(document)
        done += len(document.ids) - 1 if text.token_file else document.num_bytes
        waiting += len(document.ids)
        if waiting >= LOT * scorer.batch_tokens:
            flush()
            before, waiting = done, 0
    flush()
    if text.token_file and text.token_file.num_bytes and not limit:  # of the text itself, whatever the tokenizer makes of its bytes
        tally.bytes = text.token_file.num_bytes
    show(text.name, text.size, text.size)
    if not tally.tokens:
        raise DataError(f"There is no text in {text.name!r}.", "All its documents are empty.", f"Name another with {FLAG}.")
    return tally


def _of_texts(sources: list[Source], tokenizer: Any, field: str) -> Iterator[Document]:
    reading, begin, end = Reading(field), beginning(tokenizer), tokenizer.eot_id
    for block in reading.blocks(sources):
        for text in reading.texts(block):
            try:
                num_bytes = len(text.encode())
            except UnicodeEncodeError:  # a lone surrogate, which JSON can write as an escape
                text = mend_surrogates(text)
                num_bytes = len(text.encode())
            if text:
                yield Document(np.concatenate(([begin], tokenizer.encode_array(text), [end])), num_bytes, len(text.split()), ended=True)


def _of_tokens(file: TokenFile, tokenizer: Any) -> Iterator[Document]:
    sizes, begin, end = tokenizer.token_bytes(), beginning(tokenizer), tokenizer.eot_id
    for ids in _pieces(file, end):
        ended = bool(len(ids)) and ids[-1] == end
        text = ids[:-1] if ended else ids
        if len(text):
            words = len(tokenizer.decode_bytes(text).decode("utf-8", "replace").split())
            yield Document(np.concatenate(([begin], ids)), int(sizes[text].sum()), words, ended)


def _pieces(file: TokenFile, end: int) -> Iterator[np.ndarray]:
    """The tokens of each document; by its end-of-text tokens where the file does not say where documents start."""
    if file.documents is not None:
        starts = file.documents.astype(np.int64)
    else:
        starts = np.concatenate(([0], np.flatnonzero(np.asarray(file.tokens) == end) + 1))
    for first, last in zip(starts, [*starts[1:], file.num_tokens], strict=True):
        if first < last:
            yield np.asarray(file.tokens[first:last], np.int32)
