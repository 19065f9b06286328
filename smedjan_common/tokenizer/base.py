"""What every tokenizer does alike, whatever makes its ids: special tokens, beginnings and ends, decoding and streaming.

Every byte sequence round-trips where the tokenizer has a token for every byte. Special tokens inside text are text unless the caller
allows them.
"""

import codecs
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from smedjan_common.errors import DataError
from smedjan_common.tokenizer.chat_files import ChatSource
from smedjan_common.tokenizer.ends import Ends
from smedjan_common.tokenizer.vocabulary import END_OF_TEXT

_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "<|eot|>", "</s>", "<eos>", "<\uff5cend\u2581of\u2581sentence\uff5c>")


class BaseTokenizer:
    """special_tokens: name -> id. chat, ends: what the files beside its own say. pattern: its split expression, "" where it is another's.

    A subclass gives `_bytes` (the bytes of every id; special tokens give their name), `vocab_size`, `hash` and `encode_array`.
    """

    pattern: str
    special_tokens: dict[str, int]
    chat: ChatSource | None
    ends: Ends
    strips_first_space = False  # decoding leaves out a space that was put before the text
    _bytes: list[bytes]
    _strips: Mapping[str, tuple[bool, bool]] = {}  # special token -> whether white space before and after it goes

    @property
    def vocab_size(self) -> int:
        """Number of ids, specials included."""
        return len(self._bytes)

    @property
    def eot_id(self) -> int:
        """The id between documents, <|endoftext|>. Raises DataError where the tokenizer has none."""
        if (name := self.eot_name) is not None:
            return self.special_tokens[name]
        raise DataError(
            "The tokenizer has no end-of-text token.", f"None of {', '.join(_END_NAMES)} is in it.", "Train one with <|endoftext|>."
        )

    @property
    def eos_ids(self) -> frozenset[int]:
        """The ids at which generation ends: the one between documents, and those that the model's files name."""
        between = set() if self.eot_name is None else {self.eot_id}
        return frozenset(between | set(self.ends.eos_ids))

    @property
    def bos_id(self) -> int | None:
        """The id that stands before every text; None where nothing does."""
        return self.ends.bos_id

    def begin(self, text: str, allowed_special: Collection[str] | str = ()) -> list[int]:
        """Ids of a text that is to be continued: what stands before every text, then its own; never none. Raises DataError where there is
        nothing to begin with."""
        before = [] if self.bos_id is None else [self.bos_id]
        return before + self.encode(text, allowed_special) or [self.eot_id]

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
        for number in range(1, len(pieces), 2):
            before, after = self._strips.get(pieces[number], (False, False))
            pieces[number - 1] = pieces[number - 1].rstrip() if before else pieces[number - 1]
            pieces[number + 1] = pieces[number + 1].lstrip() if after else pieces[number + 1]
        for number, piece in enumerate(pieces):
            ids += [self.special_tokens[piece]] if number % 2 else self.encode_ordinary(piece)
        return ids

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids of `text`, special tokens being plain text."""
        return self.encode_array(text).tolist()

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that `ids` stand for; special tokens give their name, unknown ids nothing."""
        table, size = self._bytes, len(self._bytes)
        return b"".join([table[i] for i in map(int, ids) if 0 <= i < size])

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """The text that `ids` stand for. Never raises with errors="replace": what is not UTF-8 becomes U+FFFD."""
        text = self.decode_bytes(ids).decode("utf-8", errors)
        return text.removeprefix(" ") if self.strips_first_space else text

    def stream(self) -> "TokenStream":
        """Decoding token by token, whole characters only."""
        return TokenStream(self)

    def encode_array(self, text: str) -> np.ndarray:
        """`encode_ordinary` as int32 [n]."""
        raise NotImplementedError

    def encode_many(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of many texts one after another int32 [total], special tokens being plain text, and how many each has int64 [texts]."""
        raise NotImplementedError

    def encode_parts(self, texts: Sequence[str], starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`encode_many` of documents of which some were cut at safe cuts (text/cuts.py). starts: bool [texts], False for what goes on."""
        return self.encode_many(texts)


class TokenStream:
    """`push(id) -> str` gives the characters that are complete; `finish() -> str` what is left, cut-off characters as U+FFFD."""

    def __init__(self, tokenizer: BaseTokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)
