"""The tokenizer that users and the rest of smedjan see: byte-level BPE with its file, hash, decoding and streaming.

Every byte sequence round-trips: decode_bytes(encode(text)) is the text's UTF-8 (lone surrogates become U+FFFD). The file is
Hugging Face's tokenizer.json. Special tokens inside text are text unless the caller allows them.
"""

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from smedjan_common.errors import DataError
from smedjan_common.files.names import TOKENIZER
from smedjan_common.nearby import beside
from smedjan_common.text.cuts import mend_surrogates
from smedjan_common.tokenizer import chat_files, hf_json, sentencepiece_model
from smedjan_common.tokenizer.base import BaseTokenizer
from smedjan_common.tokenizer.batch import encode_in_processes, encode_many
from smedjan_common.tokenizer.chat_files import ChatSource
from smedjan_common.tokenizer.encoder import Encoder
from smedjan_common.tokenizer.ends import Ends
from smedjan_common.tokenizer.ends import beside as beside_ends
from smedjan_common.tokenizer.patterns import DEFAULT_PATTERN, Splitter
from smedjan_common.tokenizer.vocabulary import END_OF_TEXT, OtherTokenizerError, Vocabulary


class Tokenizer(BaseTokenizer):
    """Byte-level BPE. Make one with `train`, `train_from_texts`, `load` or `from_json`."""

    def __init__(self, vocabulary: Vocabulary, where: str = "The vocabulary"):
        """`where` begins what DataErrors say. Raises DataError for a vocabulary that is none (Vocabulary.check, compile)."""
        self.vocabulary = vocabulary
        self.pattern = vocabulary.pattern
        self.special_tokens = dict(vocabulary.specials)
        self.chat: ChatSource | None = None  # the chat template beside its file
        self.ends = Ends()  # what the files beside it say of beginnings and ends
        self._merges = vocabulary.compile(where)
        self._bytes = vocabulary.bytes_of()

    @classmethod
    def train(
        cls,
        files: Iterable[str | os.PathLike],
        vocab_size: int,
        pattern: str = DEFAULT_PATTERN,
        special_tokens: Sequence[str] = (END_OF_TEXT,),
        progress: Callable[[str, int, int], None] | None = None,
        min_count: int = 2,
        byte_order: str = "gpt2",
        workers: int | None = None,
        field: str = "text",
        errors: str = "strict",
        executor: str = "local",
    ) -> "Tokenizer":
        """Learn a vocabulary of `vocab_size` ids, specials included, from files (what `prepare` reads: text, JSONL, directories, globs).

        `progress(stage, done, total)`: stage "count" in bytes, "merge" in merges. `min_count`: pairs that occur less often are never
        merged, so a small text may end with fewer ids. `byte_order`: the ids of single bytes, "gpt2" or "raw". `executor`: "local" or
        "ray", where words are counted. Raises DataError.
        """
        from smedjan_common.tokenizer.training import count_files, train

        counting = (lambda done, total: progress("count", done, total)) if progress else None
        return cls(
            train(
                lambda splitter: count_files(files, splitter, workers, field, errors, counting, executor),
                vocab_size,
                pattern,
                special_tokens,
                progress,
                min_count,
                byte_order,
            )
        )

    @classmethod
    def train_from_texts(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        pattern: str = DEFAULT_PATTERN,
        special_tokens: Sequence[str] = (END_OF_TEXT,),
        progress: Callable[[str, int, int], None] | None = None,
        min_count: int = 2,
        byte_order: str = "gpt2",
    ) -> "Tokenizer":
        """The same from an iterable of texts, each a document, in this process."""
        from smedjan_common.tokenizer.training import train
        from smedjan_common.tokenizer.words import count_texts

        return cls(
            train(lambda splitter: count_texts(texts, splitter), vocab_size, pattern, special_tokens, progress, min_count, byte_order)
        )

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """From a tokenizer.json, SentencePiece's tokenizer.model, or a directory that holds one. Raises DataError for what is damaged,
        OtherTokenizerError for what no program here runs, OSError."""
        file = Path(path)
        if file.is_dir():
            file = next((file / name for name in (TOKENIZER, sentencepiece_model.FILE) if (file / name).is_file()), file / TOKENIZER)
        if not file.is_file():
            fix = "Train one: smedjan tokenizer --input TEXT --output tokenizer.json."
            raise DataError(f"There is no tokenizer {str(path)!r}.", beside(file), fix)
        text = sentencepiece_model.read(file) if file.suffix == ".model" else hf_json.read_text(file)
        document = hf_json.document(text, str(file))
        tokenizer = cls._of(text, document, str(file))
        tokenizer.chat = chat_files.beside(file)
        tokenizer.ends = beside_ends(file, document, tokenizer.special_tokens)
        return tokenizer

    @classmethod
    def from_json(cls, text: str, where: str = TOKENIZER) -> "Tokenizer":
        """From the text of a tokenizer.json; `where` names it in errors. What is not byte-level BPE of our kind runs in the library
        `tokenizers` (library.py)."""
        return cls._of(text, hf_json.document(text, where), where)

    @classmethod
    def _of(cls, text: str, document: dict[str, Any], where: str) -> "Tokenizer":
        try:
            return cls(hf_json.vocabulary(document, where), f"The tokenizer {where!r}")
        except OtherTokenizerError as ours:
            from smedjan_common.tokenizer.library import LibraryTokenizer

            try:
                return cast("Tokenizer", LibraryTokenizer(text, where, document))  # the same interface, but for the vocabulary
            except DataError as theirs:
                raise OtherTokenizerError(ours.what, f"{ours.why} {theirs.why}", theirs.fix) from None

    def to_json(self) -> str:
        """The text of tokenizer.json; loads in `tokenizers` and transformers with the same ids."""
        return hf_json.dump(self.vocabulary)

    def save(self, path: str | os.PathLike) -> Path:
        """Write tokenizer.json, atomically; a directory gets the file inside. Returns the file.

        Its text is read back first: raises DataError, and writes nothing, where `load` would refuse it or give another tokenizer.
        """
        from smedjan_common.files.atomic_file import write_atomically

        file, text = Path(path), self.to_json()
        if file.is_dir():
            file = file / TOKENIZER
        if hf_json.parse(text, str(file)).hash != self.hash:
            raise DataError(f"The tokenizer {str(file)!r} was not written.", "When read back, it differs.", "Report this.")
        write_atomically(file, text.encode())
        return file

    @property
    def vocab_size(self) -> int:
        """Number of ids, specials included."""
        return self.vocabulary.size

    @property
    def hash(self) -> str:
        """SHA-256 over what determines ids; the same whatever the file's white space."""
        return self.vocabulary.hash

    def encode_array(self, text: str) -> np.ndarray:
        """`encode_ordinary` as int32 [n]."""
        try:
            return self._encoder.encode(text)
        except UnicodeEncodeError:
            return self._encoder.encode(mend_surrogates(text))

    def encode_batch(self, texts: Sequence[str], workers: int | None = None) -> list[list[int]]:
        """`encode_ordinary` of many texts, in their order; in `workers` processes (default: this one, all cores for much text)."""
        ids, counts = encode_in_processes(self, texts, workers)
        return [part.tolist() for part in np.split(ids, np.cumsum(counts)[:-1])] if len(texts) else []

    def encode_many(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of many texts one after another int32 [total], special tokens being plain text, and how many each has int64 [texts]."""
        return encode_many(self._encoder, texts)

    @functools.cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self._merges, Splitter(self.pattern))

    def __reduce__(self):
        return (Tokenizer, (self.vocabulary,), {"chat": self.chat, "ends": self.ends})
