"""Mistral's tekken.json: a tiktoken vocabulary with its own split expression and special tokens before the ordinary ids."""

import base64
import binascii
from typing import Any

from smedjan_common.errors import DataError

# the first special tokens of files that do not list them
_NAMES = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    *("[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]"),
    *("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)


def is_one(document: Any) -> bool:
    """Whether the values of a JSON file are a tekken.json's."""
    return isinstance(document, dict) and isinstance(document.get("vocab"), list) and isinstance(document.get("config"), dict)


def parse(document: dict[str, Any], where: str) -> tuple[dict[bytes, int], str, dict[str, int]]:
    """(rank of every token, the split expression, special token -> id). The id of a token is its rank and the number of special ones."""
    config = document["config"]
    pattern, size, count = (config.get(key) for key in ("pattern", "default_vocab_size", "default_num_special_tokens"))
    if not isinstance(pattern, str) or type(size) is not int or type(count) is not int or not 0 <= count < size:
        raise _damaged(where, "Its config lacks the pattern, the size of the vocabulary or the number of special tokens.")
    ranks: dict[bytes, int] = {}
    for rank, entry in enumerate(document["vocab"][: size - count]):
        try:
            token = base64.b64decode(entry["token_bytes"], validate=True)
        except (KeyError, TypeError, binascii.Error, ValueError):
            raise _damaged(where, f"Entry {rank} of its vocabulary has no token_bytes.") from None
        if entry.get("rank") != rank or token in ranks:
            raise _damaged(where, f"Entry {rank} of its vocabulary is out of order, or there twice.")
        ranks[token] = rank
    listed = document.get("special_tokens") or [{"rank": i, "token_str": name} for i, name in enumerate(_NAMES[:count])]
    try:
        named = {entry["rank"]: entry["token_str"] for entry in listed}
    except (KeyError, TypeError):
        raise _damaged(where, "A special token has no rank or no name.") from None
    return ranks, pattern, {named.get(number, f"<SPECIAL_{number}>"): number for number in range(count)}


def _damaged(where: str, why: str) -> DataError:
    return DataError(f"Cannot use the tokenizer {where!r}.", why, "Restore the file.")
