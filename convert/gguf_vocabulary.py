"""The tokenizer in a GGUF file -> Tokenizer: byte-level BPE by the name of its split, SentencePiece's BPE by its scores."""

import json
from collections.abc import Mapping
from typing import Any

from convert.gguf_tokenizer import PRE
from smedjan_common.errors import CheckpointError, ConfigError
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.tokenizer.chat_files import ChatSource
from smedjan_common.tokenizer.ends import Ends
from smedjan_common.tokenizer.patterns import PATTERNS
from smedjan_common.tokenizer.sentencepiece_model import Piece, document

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
_LISTS: dict[str, tuple[type, ...]] = {"tokens": (str,), "token_type": (int,), "scores": (int, float), "merges": (str,)}
_WORDS: dict[tuple[type, ...], str] = {(str,): "texts", (int,): "whole numbers", (int, float): "numbers"}
_IDS = ("bos_token_id", "eos_token_id", "eot_token_id", "eom_token_id")
_VALUES: dict[str, tuple[type, ...]] = {"model": (str,), "pre": (str,), **dict.fromkeys(_IDS, (int,))}
# llama.cpp's names of splits that are known here: (pattern, whether a word that is a token is taken whole)
SPLITS = {name: (pattern, name == whole) for pattern, (whole, merged) in PRE.items() for name in (whole, merged) if name}

DIGITS = ("smollm", "starcoder", "refact")  # digits one by one, then GPT-2's split: SmolLM's and Granite 3's


def read(values: Mapping[str, Any], where: str) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer, and what its users should know; None where the file has none. Raises ConfigError for a kind that is not known."""
    if "tokenizer.ggml.tokens" not in values:
        return None, ["The file has no tokenizer: only the weights are converted, and text needs one with the same ids."]
    _check_types(values, where)
    kind, tokens = values.get("tokenizer.ggml.model"), list(values["tokenizer.ggml.tokens"])
    types: list[int] = list(values.get("tokenizer.ggml.token_type") or [1] * len(tokens))
    scores: list[float] = list(values.get("tokenizer.ggml.scores") or [0.0] * len(tokens))
    if not len(types) == len(scores) == len(tokens) or len(set(tokens)) < len(tokens):
        raise ConfigError(
            f"{where} has a tokenizer that cannot be.",
            "Types, scores and tokens differ in number, or a token is twice.",
            "Download it again.",
        )
    if kind == "llama":
        text = _sentencepiece(values, tokens, scores, types)
    elif kind == "gpt2":
        text = _byte_level(values, tokens, types, where)
    else:
        raise ConfigError(f"{where} has a tokenizer of the kind {kind!r}.", "gpt2 and llama are read.", "Take the model's safetensors.")
    tokenizer = Tokenizer.from_json(text, where)
    tokenizer.ends, tokenizer.chat = _ends(values, tokenizer), _chat(values, tokens)
    return tokenizer, [] if tokenizer.eot_name else ["The tokenizer has no end-of-text token by any known name: `prepare` needs one."]


def _check_types(values: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError for the first value of a tokenizer that is of another kind than such values are."""
    for name, kinds in (*_LISTS.items(), *_VALUES.items()):
        found = values.get(f"tokenizer.ggml.{name}")
        parts = found if name in _LISTS and isinstance(found, list) else [found]
        if found is not None and ((name in _LISTS) != isinstance(found, list) or not all(type(part) in kinds for part in parts)):
            wanted = f"a list of {_WORDS[kinds]}" if name in _LISTS else "a text" if str in kinds else "a whole number"
            raise CheckpointError(f"{where} has tokenizer.ggml.{name} {found!r:.60}.", f"It must be {wanted}.", "Download it again.")


def _byte_level(values: Mapping[str, Any], tokens: list[str], types: list[int], where: str) -> str:
    name = values.get("tokenizer.ggml.pre", "default")
    if name not in SPLITS and name not in DIGITS:
        what, known = f"{where} splits text by llama.cpp's pattern {name!r}.", ", ".join((*SPLITS, *DIGITS))
        raise ConfigError(what, f"These are known here: {known}.", "Take the model's safetensors with its tokenizer.json.")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": number, "content": token, **flags, "special": kind == _CONTROL}
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    apart = {number for number, kind in enumerate(types) if kind in (_CONTROL, _USER_DEFINED, _UNUSED)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    if name in DIGITS:
        whole, steps = False, [{"type": "Digits", "individual_digits": True}, byte_level | {"use_regex": True}]
    else:
        pattern, whole = SPLITS[name]
        steps = [{"type": "Split", "pattern": {"Regex": PATTERNS[pattern]}, "behavior": "Isolated", "invert": False}, byte_level]
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    model |= {"fuse_unk": False, "byte_fallback": False, "ignore_merges": whole}
    model["vocab"] = {token: number for number, token in enumerate(tokens) if number not in apart}
    model["merges"] = [merge.split(" ", 1) for merge in values.get("tokenizer.ggml.merges", ())]
    if any(kind == _USER_DEFINED for kind in types):  # these are tokens of the model as well, for the library
        model["vocab"] |= {entry["content"]: entry["id"] for entry in added}
    whole_file = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None}
    whole_file |= {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}, "post_processor": None}
    return json.dumps(whole_file | {"decoder": byte_level, "model": model}, ensure_ascii=False)


def _sentencepiece(values: Mapping[str, Any], tokens: list[str], scores: list[float], types: list[int]) -> str:
    pieces = [Piece(*piece) for piece in zip(tokens, scores, types, strict=True)]
    return json.dumps(document(pieces, bool(values.get("tokenizer.ggml.add_space_prefix", True))), ensure_ascii=False)


def _ends(values: Mapping[str, Any], tokenizer: Tokenizer) -> Ends:
    known = set(tokenizer.special_tokens.values())
    found = [values.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    bos = values.get("tokenizer.ggml.bos_token_id")
    adds = values.get("tokenizer.ggml.add_bos_token", values.get("tokenizer.ggml.model") == "llama")
    return Ends(tuple(dict.fromkeys(number for number in found if number in known)), bos if adds and bos in known else None)


def _chat(values: Mapping[str, Any], tokens: list[str]) -> ChatSource | None:
    template = values.get("tokenizer.chat_template")
    roles = {f"{name}_token": values.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    names = {role: tokens[number] for role, number in roles.items() if isinstance(number, int) and 0 <= number < len(tokens)}
    return ChatSource(template, names) if isinstance(template, str) else None
