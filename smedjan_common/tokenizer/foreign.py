"""Vocabularies of other tools: GPT-2's merges.txt with or without vocab.json, tiktoken's rank files, both ways, and tekken.json.

A rank file has a line `base64(token) rank` per token and no merges. The merge of a token is what is left of its bytes when only
tokens of lower rank are merged; tiktoken also takes a word that is a token whole, so `ignore_merges` is set.
"""

import base64
import binascii
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smedjan_common.errors import DataError
from smedjan_common.tokenizer import hf_json, tekken
from smedjan_common.tokenizer.bytelevel import BYTE_ORDERS, to_bytes
from smedjan_common.tokenizer.patterns import resolve
from smedjan_common.tokenizer.tekken import is_one as is_tekken
from smedjan_common.tokenizer.vocabulary import END_OF_TEXT, Vocabulary, shown

_FIX = "Give GPT-2's merges.txt, a tokenizer.json, or a tiktoken rank file."


def read(
    path: str | os.PathLike, vocab: str | os.PathLike | None = None, pattern: str | None = None, special_tokens: Sequence[str] = ()
) -> Vocabulary:
    """The vocabulary in a file of any of these kinds, or a tokenizer.json, told by its content.

    `vocab`: the vocab.json that gives the ids to a merges.txt. `pattern`: how text is split, where the file does not say
    (default: gpt2 for merges, cl100k for ranks). `special_tokens`: added after the last id where they are not there yet.
    Raises DataError with file and line, OSError.
    """
    text = _read(path)
    where = os.fspath(path)
    if text.lstrip().startswith("{"):
        if vocab or pattern:
            raise DataError(
                f"{where!r} is a tokenizer.json.", "It defines its own ids and its own pattern.", "Leave out --vocab and --pattern."
            )
        if is_tekken(document := _values(text)):
            return _with_specials(_from_tekken(document, where), special_tokens)
        return _with_specials(hf_json.parse(text, where), special_tokens)
    first = next((line for line in text.splitlines() if line.strip()), "")
    if _is_rank_line(first):
        if vocab:
            raise DataError(f"{where!r} is a tiktoken rank file.", "Its ranks are the ids.", "Leave out --vocab.")
        return _with_specials(parse_ranks(text, where, resolve(pattern or "cl100k")), special_tokens)
    return _with_specials(_from_merges(text, where, vocab, resolve(pattern or "gpt2")), special_tokens or (() if vocab else (END_OF_TEXT,)))


def parse_ranks(text: str, where: str, expression: str) -> Vocabulary:
    """The vocabulary of a tiktoken rank file."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        if not _is_rank_line(line):
            raise DataError(f"Line {number} of {where!r} is not a rank.", "A line is base64, a space, a number.", _FIX)
        token, rank = line.split()
        data = base64.b64decode(token)
        if data in ranks:
            raise DataError(f"Line {number} of {where!r} repeats a token.", f"It is {data!r}.", "Remove one of the two lines.")
        ranks[data] = int(rank)
    if len(set(ranks.values())) < len(ranks):
        raise DataError(f"{where!r} gives two tokens the same rank.", "", _FIX)
    return Vocabulary(ranks, _merges(ranks), expression, {}, ignore_merges=True)


def _values(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None  # hf_json says what is wrong


def _from_tekken(document: Any, where: str) -> Vocabulary:
    ranks, pattern, specials = tekken.parse(document, where)
    tokens = {token: rank + len(specials) for token, rank in ranks.items()}
    return Vocabulary(tokens, _merges(ranks), resolve(pattern), specials, ignore_merges=True)


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merge that makes each token, by rank."""
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = _parts_below(token, ranks, rank)
            if len(parts) == 2:  # others are reached as whole words only
                merges.append((parts[0], parts[1]))
    return merges


def dump_ranks(vocabulary: Vocabulary) -> str:
    """A tiktoken rank file. Raises DataError where ids do not follow the merges, since tiktoken merges by id."""
    made = [vocabulary.tokens[left + right] for left, right in vocabulary.merges]
    if made != sorted(made):
        raise DataError(
            "These ids cannot be tiktoken ranks.",
            "tiktoken merges the lowest id first, and here ids do not follow merges.",
            "Use tokenizer.json.",
        )
    by_id = sorted(vocabulary.tokens.items(), key=lambda item: item[1])
    return "".join(f"{base64.b64encode(token).decode()} {number}\n" for token, number in by_id)


def _parts_below(token: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    """The token's bytes after merging with the tokens of rank below `limit`."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 1:
        best, at = min((ranks.get(left + right, limit), i) for i, (left, right) in enumerate(itertools.pairwise(parts)))
        if best >= limit:
            break
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _from_merges(text: str, where: str, vocab: str | os.PathLike | None, expression: str) -> Vocabulary:
    pairs: dict[tuple[bytes, bytes], int] = {}
    known = {bytes([byte]) for byte in range(256)}
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        place = f"Line {number} of {where!r}"
        symbols = line.split(" ")
        if len(symbols) != 2 or not all(symbols):
            raise DataError(f"{place} is not a merge.", f"It has {len([one for one in symbols if one])} symbols, a merge has two.", _FIX)
        try:
            left, right = map(to_bytes, symbols)
        except KeyError as error:
            raise DataError(f"{place} has an unknown symbol.", f"{error} is not in GPT-2's byte alphabet.", _FIX) from None
        for part in (left, right):
            if part not in known:
                raise DataError(
                    f"{place} uses an unknown symbol.", f"No earlier line makes {shown(part)}.", "Restore the order of the lines."
                )
        if (left, right) in pairs:
            raise DataError(f"{place} repeats a merge.", f"It is already in line {pairs[left, right]}.", "Remove one of the two lines.")
        pairs[left, right] = number
        known.add(left + right)
    if not pairs:
        raise DataError(f"There are no merges in {where!r}.", "", _FIX)
    if vocab is not None:
        return _with_vocab(list(pairs), vocab, expression)
    tokens: dict[bytes, int] = {bytes([byte]): number for number, byte in enumerate(BYTE_ORDERS["gpt2"])}
    for left, right in pairs:
        tokens.setdefault(left + right, len(tokens))
    return Vocabulary(tokens, list(pairs), expression)


def _with_vocab(merges: list[tuple[bytes, bytes]], vocab: str | os.PathLike, expression: str) -> Vocabulary:
    """Ids from a vocab.json; its entries that no merge makes are special tokens."""
    where = os.fspath(vocab)
    try:
        table = json.loads(_read(vocab))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"Cannot read the vocabulary {where!r}.", f"It is not JSON ({error}).", "Give GPT-2's vocab.json (encoder.json)."
        ) from None
    if not isinstance(table, dict) or not all(isinstance(number, int) and number >= 0 for number in table.values()):
        raise DataError(
            f"Cannot read the vocabulary {where!r}.", "It is not an object of token: id.", "Give GPT-2's vocab.json (encoder.json)."
        )
    made = {bytes([byte]) for byte in range(256)} | {left + right for left, right in merges}
    tokens, specials = {}, {}
    for chars, number in table.items():
        try:
            token = to_bytes(chars)
        except KeyError:
            token = b""
        if token in made:
            tokens[token] = number
        else:
            specials[chars] = number
    missing = sorted(made - set(tokens))
    if missing:
        why = f"{len(missing)} bytes or results of merges have no id, the first is {shown(missing[0])}."
        raise DataError(f"The vocabulary {where!r} does not fit the merges.", why, "Give the two files of one tokenizer.")
    return Vocabulary(tokens, merges, expression, specials)


def _with_specials(vocabulary: Vocabulary, names: Sequence[str]) -> Vocabulary:
    specials = dict(vocabulary.specials)
    for name in names:
        specials.setdefault(name, max(vocabulary.size, max(specials.values(), default=0) + 1))
    return Vocabulary(vocabulary.tokens, vocabulary.merges, vocabulary.pattern, specials, vocabulary.ignore_merges)


def _read(path: str | os.PathLike) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"Cannot read {os.fspath(path)!r}.", f"It is not UTF-8 (byte {error.start}).", _FIX) from None


def _is_rank_line(line: str) -> bool:
    parts = line.split()
    if len(parts) != 2 or not parts[1].isdigit():
        return False
    try:
        return bool(base64.b64decode(parts[0], validate=True))
    except (binascii.Error, ValueError):
        return False
