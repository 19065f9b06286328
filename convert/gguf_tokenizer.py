"""A byte-level BPE tokenizer as the fields of a GGUF file.

llama.cpp knows split patterns by name (`tokenizer.ggml.pre`), so only those of the table can be written. A row also fixes whether a
word that is a token is taken whole, without merging (`ignore_merges`). Where that is off, "llama-bpe", which has it on, may still be
written if it makes no difference: when merging gives every token back from its own bytes. "dbrx" is the same pattern with it off.
"""

import dataclasses
from typing import Any

from convert.hf_tokenizer import chat_of, end_of_text
from smedjan_common.errors import ConfigError
from smedjan_common.tokenizer import Tokenizer
from smedjan_common.tokenizer.bytelevel import to_chars
from smedjan_common.tokenizer.patterns import name_of

_ONE_WORD = r"(?s:.+)"
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5  # llama.cpp's token types

# pattern -> (name where words that are tokens are taken whole, name where they are merged)
PRE: dict[str, tuple[str | None, str | None]] = {
    "gpt2": (None, "gpt-2"),
    "cl100k": ("llama-bpe", "dbrx"),
    "cl100k-digits1": (None, "qwen2"),
}


def fields(tokenizer: Tokenizer, size: int) -> dict[str, Any]:
    """The `tokenizer.ggml.*` fields for a model of `size` tokens. Raises ConfigError for a pattern that llama.cpp does not have."""
    vocabulary = tokenizer.vocabulary
    names, types = [f"<|unused_{number}|>" for number in range(size)], [_UNUSED] * size
    known = [(number, to_chars(token), _NORMAL) for token, number in vocabulary.tokens.items()]
    for number, name, kind in known + [(number, name, _CONTROL) for name, number in vocabulary.specials.items()]:
        names[number], types[number] = name, kind
    out: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre(tokenizer),
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }
    if vocabulary.merges:
        out["tokenizer.ggml.merges"] = [f"{to_chars(left)} {to_chars(right)}" for left, right in vocabulary.merges]
    if end_of_text(tokenizer) is not None:
        out |= {f"tokenizer.ggml.{name}_token_id": tokenizer.eot_id for name in ("bos", "eos")}
    chat, turn_ends = chat_of(tokenizer)
    if chat is not None:
        out["tokenizer.chat_template"] = chat
    if turn_ends:
        out["tokenizer.ggml.eot_token_id"] = turn_ends[0]
    return out


def pre(tokenizer: Tokenizer) -> str:
    """The name of the tokenizer's split pattern in llama.cpp. Raises ConfigError."""
    vocabulary = tokenizer.vocabulary
    pattern = name_of(vocabulary.pattern)
    if pattern not in PRE:
        raise ConfigError(
            f"The tokenizer splits text by the pattern {pattern or repr(vocabulary.pattern)}, which llama.cpp does not have.",
            f"llama.cpp knows patterns by name; of smedjan's it has {', '.join(PRE)}.",
            "Export to hf instead, or train with a tokenizer that uses one of these.",
        )
    whole, merged = PRE[pattern]
    chosen = whole if whole and (vocabulary.ignore_merges or merges_give_every_token(tokenizer)) else merged
    if vocabulary.ignore_merges and chosen == merged and not merges_give_every_token(tokenizer):
        raise ConfigError(
            f"The tokenizer keeps a word that is a token whole; llama.cpp does not do so with the pattern {pattern}.",
            "The same text would get different ids.",
            "Export to hf instead.",
        )
    assert chosen is not None
    return chosen


def merges_give_every_token(tokenizer: Tokenizer) -> bool:
    """Whether the merges alone make every token that is text from its bytes, so that `ignore_merges` changes nothing."""
    vocabulary = dataclasses.replace(tokenizer.vocabulary, ignore_merges=False, pattern=_ONE_WORD)
    texts = [(text, number) for token, number in vocabulary.tokens.items() if (text := _text(token)) is not None]
    ids = Tokenizer(vocabulary).encode_batch([text for text, _ in texts])
    return all(found == [number] for found, (_, number) in zip(ids, texts, strict=True))


def _text(token: bytes) -> str | None:
    """The token as text; None for a part of a character, which is never a word."""
    try:
        return token.decode("utf-8")
    except UnicodeDecodeError:
        return None
