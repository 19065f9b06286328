"""Reading and writing Hugging Face's `tokenizer.json` for byte-level BPE.

Written so that `tokenizers`, transformers and mlx-lm read it with equal ids: model BPE; pre-tokenizer Sequence(Split(Regex, Isolated),
ByteLevel without its own split); decoder ByteLevel at the top. Read: that, and ByteLevel with GPT-2's built-in split.
What another tokenizer.json asks for beyond that (normalizers, other models, added tokens that are looked for in every text) is refused
rather than ignored, and nothing in the file is believed: `parse` gives a vocabulary whose ids are sound, or DataError.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from smedjan_common.errors import DataError
from smedjan_common.tokenizer.bytelevel import to_bytes, to_chars
from smedjan_common.tokenizer.patterns import PATTERNS, Splitter, name_of
from smedjan_common.tokenizer.vocabulary import OtherTokenizerError, Vocabulary

_MAX_BYTES = 256 << 20


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


def read_text(file: Path) -> str:
    """The text of a file that may be a tokenizer.json. Raises DataError for one that is too large or not UTF-8, OSError."""
    if file.stat().st_size > _MAX_BYTES:
        raise _damaged(str(file), f"It has more than {_MAX_BYTES >> 20} MiB, as no tokenizer.json has.")
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise _damaged(str(file), f"It is not UTF-8 (byte {error.start}).") from None


def parse(text: str, where: str) -> Vocabulary:
    """The vocabulary of a tokenizer.json; `where` names it in errors. Raises DataError, OtherTokenizerError for another kind."""
    return vocabulary(document(text, where), where)


def vocabulary(found: dict[str, Any], where: str) -> Vocabulary:
    """The same from its values."""
    model = found["model"]
    _check_model(model, where)
    if found.get("normalizer") is not None:
        raise _refuse(where, f"It changes the text before splitting (normalizer {_type(found['normalizer'])}).")
    pattern = _pattern(found.get("pre_tokenizer"), where)
    specials = _specials(found.get("added_tokens"), model["vocab"], where)
    try:
        tokens = {to_bytes(chars): number for chars, number in model["vocab"].items() if chars not in specials}
        merges = [(to_bytes(left), to_bytes(right)) for left, right in map(_pair, model["merges"])]
    except KeyError as error:
        raise _refuse(where, f"The character {error} in a token is not in the byte-level alphabet.") from None
    except TypeError:
        raise _damaged(where, "A merge does not have two parts.") from None
    if not tokens:
        raise _damaged(where, "Its vocabulary is empty.")
    if len(set(merges)) < len(merges):
        raise _damaged(where, "It has a merge twice.")
    made = Vocabulary(tokens, merges, pattern, specials, bool(model.get("ignore_merges")))
    made.check(f"The tokenizer {where!r}")
    return made


def document(text: str, where: str) -> dict[str, Any]:
    """The values of a tokenizer.json. Raises DataError for what is none."""
    try:
        values = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(where, f"It is not a tokenizer.json ({error}).") from None
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise _damaged(where, "It is not a tokenizer.json: it has no model.")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for one that has a name twice: readers would take one or the other."""
    values = dict(pairs)
    if len(values) < len(pairs):
        name = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"it has {name!r} twice in one object")
    return values


def _check_model(model: dict[str, Any], where: str) -> None:
    if model.get("type", "BPE") != "BPE":
        raise _refuse(where, f"Its model is {model.get('type')}, not BPE.")
    for option in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(option):
            raise _refuse(where, f"Its model is BPE with {option}, which byte-level BPE does not have.")
    if not isinstance(model.get("ignore_merges") or False, bool):
        raise _damaged(where, f"Its ignore_merges is {model['ignore_merges']!r}, neither true nor false.")
    if not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
        raise _damaged(where, "It is not a tokenizer.json with a BPE model: its vocabulary or its merges are missing.")


def _specials(added: Any, vocab: dict[str, Any], where: str) -> dict[str, int]:
    """name -> id of the added tokens. Flags that would make other ids of a text than smedjan does are refused by name."""
    specials: dict[str, int] = {}
    if not isinstance(added or [], list):
        raise _damaged(where, "Its added_tokens are not a list.")
    for entry in added or []:
        name = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(name, str) or "id" not in entry:
            raise _damaged(where, "An added token has no content or no id.")
        if flag := next((flag for flag in ("lstrip", "rstrip", "single_word") if entry.get(flag)), None):
            raise _refuse(where, f"Its added token {name!r} has {flag}, which changes the text around it.")
        if not entry.get("special", True):
            raise _refuse(where, f"Its added token {name!r} is not special: it is looked for in every text, before splitting.")
        if name in specials or vocab.get(name, entry["id"]) != entry["id"]:
            raise _damaged(where, f"Its token {name!r} has two ids.")
        specials[name] = entry["id"]
    return specials


def _pair(merge: Any) -> tuple[str, str]:
    """A merge, written as "left right" or as [left, right]. Raises TypeError."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) for part in parts):
        raise TypeError
    return parts[0], parts[1]


def _pattern(pre_tokenizer: Any, where: str) -> str:
    """The split expression of a pre-tokenizer."""
    parts = pre_tokenizer.get("pretokenizers") if _type(pre_tokenizer) == "Sequence" else [pre_tokenizer]
    kinds = [_type(part) for part in parts] if isinstance(parts, list) else []
    last = parts[-1] if kinds and kinds[-1] == "ByteLevel" and not parts[-1].get("add_prefix_space", True) else None
    if last and kinds == ["ByteLevel"] and last.get("use_regex", True):
        return PATTERNS["gpt2"]
    if last and kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
        split = parts[0]
        isolated = split.get("behavior") == "Isolated" or (split.get("behavior") == "Removed" and split.get("invert"))
        expression = split["pattern"].get("Regex") if isinstance(split.get("pattern"), dict) else None
        if isolated and isinstance(expression, str):
            _check_pattern(expression, where)
            return expression
    raise _refuse(where, f"It splits text in a way that is not supported here ({', '.join(kinds) or 'no list of steps'}).")


def _check_pattern(expression: str, where: str) -> None:
    if name_of(expression) is None:
        try:
            Splitter(expression)
        except DataError as error:
            raise _refuse(where, f"{error.what} {error.why}") from None


def _type(part: Any) -> str:
    return str(part.get("type")) if isinstance(part, dict) else f"no object but {part!r:.40}"


def _refuse(where: str, why: str) -> OtherTokenizerError:
    return OtherTokenizerError(
        f"Cannot use the tokenizer {where!r}.", why, "Use a byte-level BPE tokenizer.json, or train one: smedjan tokenizer."
    )


def _damaged(where: str, why: str) -> DataError:
    return DataError(f"Cannot use the tokenizer {where!r}.", why, "Restore the file, or train a tokenizer: smedjan tokenizer.")
