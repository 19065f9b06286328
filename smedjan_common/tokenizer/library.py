"""A tokenizer.json that smedjan's own byte-level BPE is not, run by the library it was written for (`tokenizers`, extra `foreign`).

SentencePiece's BPE (Llama 2, Gemma), normalizers (Qwen), several splits (DeepSeek, SmolLM2), added tokens that are looked for in every
text. The file is kept as it is, byte for byte. Special tokens inside text are text unless the caller allows them; added tokens that are not
special are found in every text, as everywhere.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smedjan_common.errors import DataError
from smedjan_common.files.names import TOKENIZER
from smedjan_common.text.cuts import mend_surrogates
from smedjan_common.tokenizer import hf_json
from smedjan_common.tokenizer.base import BaseTokenizer
from smedjan_common.tokenizer.bytelevel import to_bytes
from smedjan_common.tokenizer.ends import Ends
from smedjan_common.tokenizer.vocabulary import MAX_IDS, OtherTokenizerError, Vocabulary

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "\u2581"  # how SentencePiece writes a space


class LibraryTokenizer(BaseTokenizer):
    """`raw`: the text of its file. user_defined: name -> id of added tokens that are found in every text."""

    def __init__(self, raw: str, where: str = TOKENIZER, document: dict[str, Any] | None = None):
        """document: its values, where they are known.

        Raises DataError for a file that the library does not read, OtherTokenizerError where it is not installed.
        """
        self.raw, self.where, self.pattern = raw, where, ""
        self.chat, self.ends = None, Ends()
        document = document or hf_json.document(raw, where)
        if document["model"].get("dropout"):
            why = "Its model is BPE with dropout: the same text gets other ids each time."
            raise OtherTokenizerError(f"Cannot use the tokenizer {where!r}.", why, "Set dropout to null in the file.")
        self._library = _load(raw, where)
        added = self._library.get_added_tokens_decoder()
        self.special_tokens = {token.content: number for number, token in added.items() if token.special}
        self.user_defined = {token.content: number for number, token in added.items() if not token.special}
        self._strips = {token.content: (token.lstrip, token.rstrip) for token in added.values() if token.special}
        self._bytes = _table(self._library, document, where)
        self.strips_first_space = _strips_first_space(document.get("decoder"))

    @property
    def vocabulary(self) -> Vocabulary:
        """There is none: it is not byte-level BPE of smedjan's kind. Raises OtherTokenizerError."""
        raise OtherTokenizerError(
            f"The tokenizer {self.where!r} has no such form.", "It is not plain byte-level BPE.", "Keep its tokenizer.json as it is."
        )

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 over the file's values, less what is only about lengths (padding, truncation)."""
        document = {key: value for key, value in json.loads(self.raw).items() if key not in ("padding", "truncation")}
        content = json.dumps(["smedjan-tokenizer-2", document], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()

    @functools.cached_property
    def missing_bytes(self) -> int:
        """How many of the 256 bytes have no token; the library leaves them out of a text."""
        return 256 - len({token for token in self._bytes if len(token) == 1})

    def to_json(self) -> str:
        return self.raw

    def save(self, path: str | os.PathLike) -> Path:
        from smedjan_common.files.atomic_file import write_atomically

        file = Path(path)
        file = file / TOKENIZER if file.is_dir() else file
        write_atomically(file, self.raw.encode())
        return file

    def encode_array(self, text: str) -> np.ndarray:
        return self.encode_many([text])[0]

    def encode_batch(self, texts: Sequence[str], workers: int | None = None) -> list[list[int]]:
        ids, counts = self.encode_many(texts)
        return [part.tolist() for part in np.split(ids, np.cumsum(counts)[:-1])] if len(texts) else []

    def encode_many(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        with _without_panic(self.where):
            parts = [one.ids for one in self._library.encode_batch_fast(list(map(_mended, texts)), add_special_tokens=False)]
        counts = np.fromiter(map(len, parts), np.int64, len(parts))
        return np.fromiter((number for part in parts for number in part), np.int32, int(counts.sum())), counts

    def encode_parts(self, texts: Sequence[str], starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What goes on is encoded behind a newline, whose ids are then left out: SentencePiece puts a space before a text alone."""
        newline = self.encode_ordinary("\n")
        ids, counts = self.encode_many([text if begins else f"\n{text}" for text, begins in zip(texts, starts, strict=True)])
        left_out = np.where(starts, 0, len(newline))
        firsts = np.cumsum(counts) - counts
        kept = np.ones(len(ids), bool)
        for first in firsts[~starts]:
            assert ids[first : first + len(newline)].tolist() == newline, "no token goes across a safe cut"
            kept[first : first + len(newline)] = False
        return ids[kept], counts - left_out

    def __reduce__(self):
        return (LibraryTokenizer, (self.raw, self.where), {"chat": self.chat, "ends": self.ends})


def _load(raw: str, where: str) -> Any:
    try:
        import tokenizers
    except ImportError:
        why = "It is not plain byte-level BPE, and the library that runs it, tokenizers, is not installed."
        raise OtherTokenizerError(f"Cannot use the tokenizer {where!r}.", why, "Install it: pip install 'smedjan[foreign]'.") from None
    try:
        with _without_panic(where):
            library = tokenizers.Tokenizer.from_str(raw)
    except DataError:
        raise
    except Exception as error:  # the library raises bare Exception
        raise _refused(where, error) from None
    library.no_padding()
    library.no_truncation()
    library.encode_special_tokens = True  # special tokens in a text are text
    return library


@contextlib.contextmanager
def _without_panic(where: str) -> Iterator[None]:
    """The library panics at some damaged files, when they are read or later; no handler of errors would see that."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise _refused(where, error) from None


def _refused(where: str, error: BaseException) -> DataError:
    why = f"The library tokenizers says: {(str(error) or 'nothing').splitlines()[0][:200]}."
    return DataError(f"Cannot use the tokenizer {where!r}.", why, "Restore the file.")


def _table(library: Any, document: dict[str, Any], where: str) -> list[bytes]:
    """The bytes of every id; special and added tokens give their name, unused ids nothing."""
    ids = library.get_vocab(with_added_tokens=True)
    size = max(ids.values(), default=-1) + 1
    if not 0 < size <= MAX_IDS:
        raise DataError(f"The tokenizer {where!r} has {size} ids.", f"A tokenizer has 1 to {MAX_IDS}.", "Restore the file.")
    table = [b""] * size
    of = _byte_level if _has(document.get("decoder"), "ByteLevel") or _has(document.get("pre_tokenizer"), "ByteLevel") else _spaces
    for token, number in ids.items():
        table[number] = of(token)
    for number, token in library.get_added_tokens_decoder().items():
        table[number] = token.content.encode("utf-8", "replace")
    return table


def _byte_level(token: str) -> bytes:
    try:
        return to_bytes(token)
    except KeyError:  # no token of the alphabet: it stands for itself
        return token.encode("utf-8", "replace")


def _spaces(token: str) -> bytes:
    if byte := _BYTE.fullmatch(token):
        return bytes([int(byte[1], 16)])
    return token.replace(_SPACE, " ").encode("utf-8", "replace")


def _has(step: Any, kind: str) -> bool:
    """Whether a step of tokenizer.json, or one of a sequence of steps, is of a kind."""
    if isinstance(step, list):
        return any(_has(one, kind) for one in step)
    if not isinstance(step, dict):
        return False
    return step.get("type") == kind or any(_has(step.get(key), kind) for key in ("pretokenizers", "decoders", "normalizers"))


def _strips_first_space(decoder: Any) -> bool:
    """Whether decoding leaves out the space that was put before the text (SentencePiece)."""
    steps = decoder.get("decoders") if isinstance(decoder, dict) and decoder.get("type") == "Sequence" else [decoder]
    for step in steps if isinstance(steps, list) else ():
        if isinstance(step, dict) and step.get("type") == "Strip" and step.get("content") == " " and step.get("start"):
            return True
        if isinstance(step, dict) and step.get("type") == "Metaspace":
            return step.get("prepend_scheme", "always") != "never"
    return False


def _mended(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return mend_surrogates(text)
    return text
