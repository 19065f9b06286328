"""The tokenizer that users and the rest of smedjan see: byte-level BPE with its file, hash, decoding and streaming.

Every byte sequence round-trips: decode_bytes(encode(text)) is the text's UTF-8 (lone surrogates become U+FFFD). The file is
Hugging Face's tokenizer.json. Special tokens inside text are text unless the caller allows them.
"""

import codecs
import functools
import os
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

import numpy as np

from smedjan_common.errors import DataError
from smedjan_common.files.names import TOKENIZER
from smedjan_common.nearby import beside
from smedjan_common.text.cuts import mend_surrogates
from smedjan_common.tokenizer import chat_files, hf_json
from smedjan_common.tokenizer.batch import encode_in_processes, encode_many
from smedjan_common.tokenizer.chat_files import ChatSource
from smedjan_common.tokenizer.encoder import Encoder
from smedjan_common.tokenizer.patterns import DEFAULT_PATTERN, Splitter
from smedjan_common.tokenizer.vocabulary import END_OF_TEXT, Vocabulary

_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "<|eot|>", "</s>", "<eos>")


class Tokenizer:
    """Byte-level BPE. Make one with `train`, `train_from_texts`, `load` or `from_json`."""

    def __init__(self, vocabulary: Vocabulary, where: str = "The vocabulary"):
        """`where` begins what DataErrors say. Raises DataError for a vocabulary that is none (Vocabulary.check, compile)."""
        self.vocabulary = vocabulary
        self.pattern = vocabulary.pattern
        self.special_tokens = dict(vocabulary.specials)
        self.chat: ChatSource | None = None  # the chat template beside its file
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
    ) -> "Tokenizer":
        """Learn a vocabulary of `vocab_size` ids, specials included, from files (what `prepare` reads: text, JSONL, directories, globs).

        `progress(stage, done, total)`: stage "count" in bytes, "merge" in merges. `min_count`: pairs that occur less often are never
        merged, so a small text may end with fewer ids. `byte_order`: the ids of single bytes, "gpt2" or "raw". Raises DataError.
        """
        from smedjan_common.tokenizer.training import count_files, train

        counting = (lambda done, total: progress("count", done, total)) if progress else None
        return cls(
            train(
                lambda splitter: count_files(files, splitter, workers, field, errors, counting),
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
        """From a tokenizer.json or a directory that holds one. Raises DataError for what is damaged or no byte-level BPE, OSError."""
        file = Path(path)
        if file.is_dir():
            file = file / TOKENIZER
        if not file.is_file():
            fix = "Train one: smedjan tokenizer --input TEXT --output tokenizer.json."
            raise DataError(f"There is no tokenizer {str(path)!r}.", beside(file), fix)
        tokenizer = cls.from_json(hf_json.read_text(file), str(file))
        tokenizer.chat = chat_files.beside(file)
        return tokenizer

    @classmethod
    def from_json(cls, text: str, where: str = TOKENIZER) -> "Tokenizer":
        """From the text of a tokenizer.json; `where` names it in errors."""
        return cls(hf_json.parse(text, where), f"The tokenizer {where!r}")

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

    @property
    def eot_id(self) -> int:
        """The id between documents, <|endoftext|>. Raises DataError where the tokenizer has none."""
        if (name := self.eot_name) is not None:
            return self.special_tokens[name]
        raise DataError(
            "The tokenizer has no end-of-text token.", f"None of {', '.join(_END_NAMES)} is in it.", "Train one with <|endoftext|>."
        )

    @property
    def eot_name(self) -> str | None:
        """The name of the token between documents; None where the tokenizer has none."""
        return next((name for name in _END_NAMES if name in self.special_tokens), None)

    def token_bytes(self) -> np.ndarray:
        """int32 [vocab_size]: UTF-8 bytes that each token stands for, 0 for specials; turns loss per token into bits per byte."""
        sizes = np.fromiter(map(len, self._bytes), np.int32, len(self._bytes))
        sizes[list(self.special_tokens.values())] = 0
        return sizes

    def encode(self, text: str, allowed_special: Collection[str] | str = ()) -> list[int]:
        """Ids of `text`. Special tokens in it are plain text, but those in `allowed_special` ("all": every one) become their id."""
        allowed = set(self.special_tokens) if allowed_special == "all" else set(allowed_special) & set(self.special_tokens)
        if not allowed:
            return self.encode_ordinary(text)
        ids: list[int] = []
        pieces = re.split("(" + "|".join(map(re.escape, sorted(allowed, key=len, reverse=True))) + ")", text)
        for number, piece in enumerate(pieces):
            ids += [self.special_tokens[piece]] if number % 2 else self.encode_ordinary(piece)
        return ids

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of `text`, special tokens being plain text."""
        return self.encode_array(text).tolist()

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

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for; special tokens give their name, unknown ids nothing."""
        table, size = self._bytes, len(self._bytes)
        return b"".join([table[i] for i in map(int, ids) if 0 <= i < size])

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """The text that `ids` stand for. Never raises with errors="replace": what is not UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors)

    def stream(self) -> "TokenStream":
        """Decoding token by token, whole characters only."""
        return TokenStream(self)

    @functools.cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self._merges, Splitter(self.pattern))

    def __reduce__(self):
        return (Tokenizer, (self.vocabulary,))


class TokenStream:
    """`push(id) -> str` gives the characters that are complete; `finish() -> str` what is left, cut-off characters as U+FFFD."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)
