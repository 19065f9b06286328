"""SentencePiece's BPE models (tokenizer.model of Llama 2, Mistral 7B) as a tokenizer.json that `tokenizers` runs with their ids.

A .model file is a protocol buffer: pieces (text, score, kind), how it was trained, how it normalises. The merges of a piece are all its
splits into two pieces; the higher the score of a piece, the earlier it is merged. What would run otherwise there (unigram models,
normalisation tables) is refused by name.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from smedjan_common.errors import DataError, reason
from smedjan_common.tokenizer.vocabulary import MAX_IDS, OtherTokenizerError

FILE = "tokenizer.model"
_MAX_BYTES = 64 << 20
_SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


class Piece(NamedTuple):
    """kind: one of the above."""

    text: str
    score: float
    kind: int


def read(path: Path) -> str:
    """The text of a tokenizer.json with the same ids. Raises DataError, OtherTokenizerError for a model of another kind, OSError."""
    where = str(path)
    if path.stat().st_size > _MAX_BYTES:
        raise _damaged(where, f"It has more than {_MAX_BYTES >> 20} MiB.")
    try:
        pieces, trainer, normalizer = _parse(path.read_bytes())
    except (ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
        raise _damaged(where, f"It is no SentencePiece model. {reason(error)}") from None
    if not 0 < len(pieces) <= MAX_IDS or len({piece.text for piece in pieces}) < len(pieces):
        raise _damaged(where, f"Of its {len(pieces)} pieces two are the same, or there are none.")
    _refuse_other_kinds(where, trainer, normalizer)
    return json.dumps(document(pieces, bool(normalizer.get(3, [1])[-1])), ensure_ascii=False)


def _refuse_other_kinds(where: str, trainer: dict[int, list[Any]], normalizer: dict[int, list[Any]]) -> None:
    if trainer.get(3, [1])[-1] != 2:
        raise OtherTokenizerError(f"Cannot use the tokenizer {where!r}.", "Its model is unigram, not BPE.", "Use its tokenizer.json.")
    if normalizer.get(2, [b""])[-1] or normalizer.get(4, [1])[-1]:
        why = "It normalises text by a table, or drops spaces."
        raise OtherTokenizerError(f"Cannot use the tokenizer {where!r}.", why, "Use its tokenizer.json.")


def document(pieces: list[Piece], prefix: bool) -> dict[str, Any]:
    """The values of a tokenizer.json with these pieces as ids. prefix: a space is put before a text."""
    vocab = {piece.text: number for number, piece in enumerate(pieces)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": number, "content": piece.text, **flags, "special": piece.kind != USER_DEFINED}
        for number, piece in enumerate(pieces)
        if piece.kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    unknown = next((piece.text for piece in pieces if piece.kind == UNKNOWN), None)
    space = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    normalizers = [{"type": "Prepend", "prepend": _SPACE}, space] if prefix else [space]
    decoders: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}, {"type": "ByteFallback"}]
    decoders.append({"type": "Fuse"})
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": _beginning(pieces),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(piece.kind == BYTE for piece in pieces),
            "ignore_merges": False,
            "vocab": vocab,
            "merges": _merges(pieces),
        },
    }


def _merges(pieces: list[Piece]) -> list[list[str]]:
    """All splits of every piece into two, those of the highest score first."""
    known = {piece.text: number for number, piece in enumerate(pieces) if piece.kind in (NORMAL, USER_DEFINED, UNUSED)}
    found = []
    for piece in pieces:
        if piece.kind == NORMAL:
            text = piece.text
            splits = [(text[:at], text[at:]) for at in range(1, len(text))]
            pairs = [pair for pair in splits if pair[0] in known and pair[1] in known]
            found += [(-piece.score, known[pair[0]], known[pair[1]], pair) for pair in pairs]
    return [list(pair) for *_, pair in sorted(found)]


def _beginning(pieces: list[Piece]) -> dict[str, Any] | None:
    """Models of this kind were trained with <s> before every text."""
    number = next((number for number, piece in enumerate(pieces) if piece.kind == CONTROL and piece.text == "<s>"), None)
    if number is None:
        return None
    first, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {
        "type": "TemplateProcessing",
        "single": [first, text[0]],
        "pair": [first, text[0], first, text[1]],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [number], "tokens": ["<s>"]}},
    }


# the protocol buffer


def _parse(data: bytes) -> tuple[list[Piece], dict[int, list[Any]], dict[int, list[Any]]]:
    """(pieces, fields of trainer_spec, fields of normalizer_spec)."""
    pieces, trainer, normalizer = [], dict[int, list[Any]](), dict[int, list[Any]]()
    for number, value in _fields(data):
        if number == 1:
            fields = _message(value)
            score = struct.unpack("<f", fields.get(2, [b"\0\0\0\0"])[-1])[0]
            pieces.append(Piece(fields[1][-1].decode("utf-8"), score, fields.get(3, [NORMAL])[-1]))
        elif number == 2:
            trainer = _message(value)
        elif number == 3:
            normalizer = _message(value)
    return pieces, trainer, normalizer


def _message(data: Any) -> dict[int, list[Any]]:
    if not isinstance(data, bytes):
        raise ValueError("a message is a number")
    found: dict[int, list[Any]] = {}
    for number, value in _fields(data):
        found.setdefault(number, []).append(value)
    return found


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number of the field, its value): a whole number, or bytes. Raises ValueError, IndexError for what is cut short."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            size, at = _varint(data, at)
        if size is None or at + size > len(data):
            raise ValueError("it is cut short")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
    raise ValueError("a number is too long")


def _damaged(where: str, why: str) -> DataError:
    return DataError(f"Cannot use the tokenizer {where!r}.", why, "Restore the file.")
