"""What a byte-level BPE tokenizer is, as plain data, and its canonical hash. Readers and writers of foreign formats meet here."""

import functools
import hashlib
import json
from dataclasses import dataclass, field

import numpy as np

from smedjan_common.errors import DataError
from smedjan_common.tokenizer.bpe import Merges
from smedjan_common.tokenizer.bytelevel import to_bytes

END_OF_TEXT = "<|endoftext|>"
MAX_IDS = 1 << 21  # of a vocabulary; usual sizes are 8192 to 262144


class OtherTokenizerError(DataError):
    """A tokenizer that is whole and of a kind that smedjan's own byte-level BPE is not."""


@dataclass(frozen=True)
class Vocabulary:
    """`tokens`: bytes -> id of ordinary tokens (all 256 bytes among them). `merges`: pairs of tokens by rank, the first merged first.

    `specials`: name -> id. `pattern`: the split expression. `ignore_merges`: a word that is a token is that token.
    """

    tokens: dict[bytes, int]
    merges: list[tuple[bytes, bytes]]
    pattern: str
    specials: dict[str, int] = field(default_factory=dict)
    ignore_merges: bool = False

    @functools.cached_property
    def size(self) -> int:
        """One more than the largest id."""
        return max(max(self.tokens.values()), max(self.specials.values(), default=0)) + 1

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 over what determines ids and text; the same whatever file the tokenizer came from."""
        tokens = sorted((number, token.hex()) for token, number in self.tokens.items())
        merges = [[self.tokens[left], self.tokens[right]] for left, right in self.merges]
        content = ["smedjan-tokenizer-1", self.pattern, self.ignore_merges, tokens, merges, sorted(self.specials.items())]
        return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()

    def check(self, where: str = "The vocabulary") -> None:
        """Raises DataError, beginning with `where`, for ids and names that no tokenizer can have: in what was read and in what is made."""
        seen: dict[int, bytes | str] = {}
        for name, number in (*self.tokens.items(), *self.specials.items()):
            if type(number) is not int or not 0 <= number < MAX_IDS:
                why = f"An id is a whole number from 0 to {MAX_IDS - 1}."
                raise DataError(
                    f"{where} gives the token {shown(name)} the id {number!r}.", why, "Restore the file, or use another tokenizer."
                )
            if seen.setdefault(number, name) is not name:
                why = "An id stands for one token, or its text would be ambiguous."
                raise DataError(
                    f"{where} has two tokens with the same id {number}: {shown(seen[number])} and {shown(name)}.", why, "Restore the file."
                )
        for name in self.specials:
            if problem := special_problem(name):
                raise DataError(f"{where} has a special token {name!r}.", problem, "Give it another name, such as <|name|>.")
            if as_bytes(name) in self.tokens:
                why = "It is an ordinary token of the same vocabulary too, and a tokenizer.json keeps one id for a name."
                raise DataError(f"{where} has a special token {name!r}.", why, "Give it another name, such as <|name|>.")

    def compile(self, where: str = "The vocabulary") -> Merges:
        """The merges over internal symbols. Raises DataError, beginning with `where`, for what `check` refuses, a byte without token and
        a merge of or into no token."""
        self.check(where)
        symbol = {bytes([byte]): byte for byte in range(256)}
        missing = [token for token in symbol if token not in self.tokens]
        if missing:
            raise OtherTokenizerError(
                f"{where} lacks {len(missing)} of the 256 bytes, the first is 0x{missing[0].hex()}.",
                "A byte-level tokenizer needs a token for every byte, or some texts could not be encoded.",
                "Use a byte-level BPE vocabulary (GPT-2's kind).",
            )
        pairs, results = [], []
        for rank, (left, right) in enumerate(self.merges):
            made = left + right
            if not {made, left, right} <= self.tokens.keys():
                raise DataError(
                    f"{where} has merge {rank + 1} ({shown(left)} + {shown(right)}), of a token that does not exist.",
                    "Both parts of a merge and its result are in the vocabulary.",
                    "Check that merges and vocabulary belong together.",
                )
            # a part may be made by later merges only: files made of tiktoken's list every split of a token
            pairs.append((symbol.setdefault(left, len(symbol)), symbol.setdefault(right, len(symbol))))
            results.append(symbol.setdefault(made, len(symbol)))
        if self.ignore_merges:
            for token in self.tokens:
                symbol.setdefault(token, len(symbol))
        ids = np.fromiter((self.tokens[token] for token in symbol), np.int32, len(symbol))
        return Merges(pairs, results, ids, symbol if self.ignore_merges else None)

    def bytes_of(self) -> list[bytes]:
        """The bytes of every id; specials give their name in UTF-8, unused ids nothing."""
        table = [b""] * self.size
        for token, number in self.tokens.items():
            table[number] = token
        for name, number in self.specials.items():
            table[number] = name.encode()
        return table


def special_problem(name: str) -> str:
    """Why no special token can have this name; empty where one can."""
    if not name:
        return "Its name is empty."
    if any("\ud800" <= character <= "\udfff" for character in name):
        return "Its name is not Unicode text, so no file can hold it."
    return ""


def as_bytes(name: str) -> bytes:
    """The bytes of the ordinary token that a tokenizer.json writes as `name`; b"" where it writes none so."""
    try:
        return to_bytes(name)
    except KeyError:
        return b""


def shown(name: bytes | str) -> str:
    """A token as errors show it, in quotes; bytes that are no ASCII as escapes."""
    return repr(name).removeprefix("b")
