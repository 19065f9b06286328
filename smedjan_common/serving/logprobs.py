"""Log-probabilities of tokens in the two shapes of OpenAI's API.

chat     one entry a token: {token, logprob, bytes, top_logprobs}; bytes are exact, since half a character is no text
legacy   {tokens, token_logprobs, top_logprobs, text_offset}; a token that is no text by itself is written bytes:\\xf0\\x9f there, so
         that no two have one name; offsets count characters from the beginning of prompt and answer

A control token has its name for a token and no bytes, as it adds nothing to the text.
"""

import codecs
import math
from collections.abc import Iterable
from typing import Any

from smedjan_common.inference.request import TokenInfo
from smedjan_common.serving.served import Served

LEAST = -9999.0  # instead of minus infinity, which JSON cannot say


def chat_logprobs(tokens: Iterable[TokenInfo], served: Served) -> dict[str, Any]:
    """`choice.logprobs` of a chat, of the tokens that are text."""

    def entry(token: int, raw: bytes, logprob: float | None) -> dict[str, Any]:
        name = served.control.get(token)
        text = raw.decode("utf-8", "replace") if name is None else name
        return {"token": text, "logprob": _number(logprob), "bytes": list(raw) if name is None else None}

    return {
        "content": [
            entry(each.id, each.bytes, each.logprob)
            | {"top_logprobs": [entry(token, served.tokenizer.decode_bytes([token]), value) for token, value in each.top]}
            for each in tokens
            if each.id not in served.control
        ],
        "refusal": None,
    }


class LegacyLogprobs:
    """Makes the legacy shape piece by piece; `start` is the character at which the first token begins."""

    def __init__(self, start: int, served: Served):
        self._at, self._served = start, served
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, tokens: Iterable[TokenInfo]) -> dict[str, list]:
        """`choice.logprobs` of the next tokens. An entry without a log-probability is null: the first token has none."""
        found: dict[str, list] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for each in tokens:
            name = self._name(each.id, each.bytes)
            found["tokens"].append(name)
            found["token_logprobs"].append(None if each.logprob is None else _number(each.logprob))
            found["top_logprobs"].append(None if each.logprob is None else self._top(each, name))
            found["text_offset"].append(self._at)
            if each.id not in self._served.control:
                self._at += len(self._decoder.decode(each.bytes))
        return found

    def _top(self, token: TokenInfo, name: str) -> dict[str, float]:
        """The most probable tokens and the one that was chosen; of two of one name the more probable counts."""
        pairs = [(self._name(other, self._served.tokenizer.decode_bytes([other])), value) for other, value in token.top]
        found: dict[str, float] = {}
        for key, value in [*pairs, (name, token.logprob)]:
            found[key] = max(found.get(key, -math.inf), _number(value))
        return found

    def _name(self, token: int, raw: bytes) -> str:
        if token in self._served.control:
            return self._served.control[token]
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _number(logprob: float | None) -> float:
    return LEAST if logprob is None else max(logprob, LEAST)
