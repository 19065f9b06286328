"""Reading and writing Hugging Face's `tokenizer.json` for byte-level BPE.

Written so that `tokenizers`, transformers and mlx-lm read it with equal ids: model BPE; pre-tokenizer Sequence(Split(Regex, Isolated),
ByteLevel without its own split); decoder ByteLevel at the top. Read: that, and ByteLevel with GPT-2's built-in split.
What another tokenizer.json asks for beyond that (normalizers, other models) is refused rather than ignored.
"""

import json
from typing import Any

from smedjan_common.errors import DataError
from smedjan_common.tokenizer.bytelevel import to_bytes, to_chars
from smedjan_common.tokenizer.patterns import PATTERNS
from smedjan_common.tokenizer.vocabulary import Vocabulary


def dump(vocabulary: Vocabulary) -> str:
    """The text of tokenizer.json."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": vocabulary.pattern}, "behavior": "Isolated", "invert": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    by_id = sorted(vocabulary.tokens.items(), key=lambda item: item[1])
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": n, "content": name} | flags for name, n in sorted(vocabulary.specials.items(), key=lambda item: item[1])],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": vocabulary.ignore_merges,
            "vocab": {to_chars(token): number for token, number in by_id},
            "merges": [[to_chars(left), to_chars(right)] for left, right in vocabulary.merges],
        },
    }
    return json.dumps(document, ensure_ascii=False)


def parse(text: str, where: str) -> Vocabulary:
    """The vocabulary of a tokenizer.json; `where` names it in errors. Raises DataError."""
    try:
        document = json.loads(text)
        model = document["model"]
        vocab, merges = model["vocab"], model["merges"]
    except (ValueError, KeyError, TypeError) as error:
        raise _refuse(where, f"It is no tokenizer.json with a BPE model ({error}).") from None
    if (
        model.get("type", "BPE") != "BPE"
        or model.get("byte_fallback")
        or model.get("continuing_subword_prefix")
        or model.get("end_of_word_suffix")
    ):
        raise _refuse(where, f"Its model is {model.get('type')} with options that byte-level BPE does not have.")
    if document.get("normalizer") is not None:
        raise _refuse(where, f"It changes the text before splitting (normalizer {_type(document['normalizer'])}).")
    pattern = _pattern(document.get("pre_tokenizer"), where)
    specials = {added["content"]: added["id"] for added in document.get("added_tokens") or []}
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
    try:
        tokens = {to_bytes(chars): number for chars, number in vocab.items() if chars not in specials}
        byte_merges = [(to_bytes(left), to_bytes(right)) for left, right in pairs]
    except KeyError as error:
        raise _refuse(where, f"The character {error} in a token is not of the byte-level alphabet.") from None
    except ValueError:
        raise _refuse(where, "A merge has not two parts.") from None
    if not tokens:
        raise _refuse(where, "Its vocabulary is empty.")
    return Vocabulary(tokens, byte_merges, pattern, specials, bool(model.get("ignore_merges")))


def _pattern(pre_tokenizer: Any, where: str) -> str:
    """The split expression of a pre-tokenizer."""
    parts = pre_tokenizer["pretokenizers"] if _type(pre_tokenizer) == "Sequence" else [pre_tokenizer]
    kinds = [_type(part) for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True) and not parts[0].get("add_prefix_space", True):
        return PATTERNS["gpt2"]
    if kinds == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True) and not parts[1].get("add_prefix_space", True):
        split = parts[0]
        isolated = split["behavior"] == "Isolated" or (split["behavior"] == "Removed" and split["invert"])
        if isolated and "Regex" in split["pattern"]:
            return split["pattern"]["Regex"]
    raise _refuse(where, f"It splits text in a way that is not known here ({', '.join(kinds)}).")


def _type(part: Any) -> str:
    return str(part.get("type")) if isinstance(part, dict) else str(part)


def _refuse(where: str, why: str) -> DataError:
    return DataError(f"Cannot use the tokenizer {where!r}.", why, "Use a byte-level BPE tokenizer.json, or train one: smedjan tokenizer.")
