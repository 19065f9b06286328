"""Pieces of text become OpenAI's replies: one JSON object, or the chunks of a stream.

A stream of a chat begins with the role, and ends, choice by choice, with a chunk without text that has the finish_reason: "stop" where
the model or a stop text ended it, "length" where it was cut, nothing else. All chunks have one id. With n choices, chunks are told apart
by `index`.
"""

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from smedjan_common.inference.request import Piece, TokenInfo, Usage
from smedjan_common.serving.logprobs import LegacyLogprobs, chat_logprobs
from smedjan_common.serving.openai_requests import Asked
from smedjan_common.serving.served import Served


@dataclass
class _Choice:
    """One answer as far as it has come."""

    index: int
    legacy: LegacyLogprobs
    strips: bool
    texts: list[str] = field(default_factory=list)
    tokens: list[TokenInfo] = field(default_factory=list)
    finish_reason: str | None = None

    def text(self, piece: Piece) -> str:
        """The new text, without the space that a template puts before an answer."""
        if self.strips and piece.text:
            self.strips = False
            return piece.text.removeprefix(" ")
        return piece.text


class Replies:
    """The replies to one request. Give it every piece by `chunks` in a stream, else by `add`."""

    def __init__(self, asked: Asked, served: Served):
        self._asked, self._served = asked, served
        kind, self._object = ("chatcmpl", "chat.completion") if asked.chat else ("cmpl", "text_completion")
        self._head = {"id": f"{kind}-{secrets.token_hex(12)}", "created": int(time.time()), "model": asked.model}
        self._usages: dict[int, Usage] = {}
        self._choices = [
            _Choice(index, LegacyLogprobs(asked.starts[index // asked.n], served), asked.strips) for index in range(len(asked.requests))
        ]

    def add(self, index: int, piece: Piece) -> None:
        """Keep a piece of choice `index` for `whole`."""
        choice = self._choices[index]
        choice.texts.append(choice.text(piece))
        choice.tokens += piece.tokens if self._asked.logprobs is not None else ()
        self._note(choice, piece)

    def whole(self) -> dict[str, Any]:
        """The reply, once every choice has ended."""
        choices = [
            self._choice(choice, self._content("".join(choice.texts)), choice.tokens) | {"finish_reason": choice.finish_reason}
            for choice in self._choices
        ]
        return self._reply(self._object, choices) | {"usage": self.usage()}

    def begin(self) -> Iterator[dict[str, Any]]:
        """The first chunks of a stream."""
        if self._asked.chat:
            for choice in self._choices:
                yield self._chunk({"index": choice.index, "delta": {"role": "assistant", "content": ""}, "logprobs": None})

    def chunks(self, index: int, piece: Piece) -> Iterator[dict[str, Any]]:
        """The chunks of a piece of choice `index`."""
        choice = self._choices[index]
        text = choice.text(piece)
        has_logprobs = self._asked.logprobs is not None and bool(piece.tokens)
        if text or has_logprobs:
            yield self._chunk(self._choice(choice, {"delta": {"content": text}} if self._asked.chat else {"text": text}, piece.tokens))
        self._note(choice, piece)
        if piece.finish_reason:
            last = {"delta": {}} if self._asked.chat else {"text": ""}
            yield self._chunk({"index": index, **last, "logprobs": None}, piece.finish_reason)

    def end(self) -> Iterator[dict[str, Any]]:
        """The chunk of usage, where it is asked for."""
        if self._asked.include_usage:
            yield self._reply(self._chunk_object, []) | {"usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens of all choices; a prompt counts once, however many samples are drawn."""
        prompt = sum(self._usages[i].prompt_tokens for i in self._usages if i % self._asked.n == 0)
        cached = sum(self._usages[i].cached_tokens for i in self._usages if i % self._asked.n == 0)
        generated = sum(usage.completion_tokens for usage in self._usages.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _note(self, choice: _Choice, piece: Piece) -> None:
        choice.finish_reason = piece.finish_reason or choice.finish_reason
        if piece.usage is not None:
            self._usages[choice.index] = piece.usage

    def _content(self, text: str) -> dict[str, Any]:
        if self._asked.chat:
            return {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"text": text}

    def _choice(self, choice: _Choice, content: dict[str, Any], tokens: Sequence[TokenInfo]) -> dict[str, Any]:
        if self._asked.logprobs is None:
            told = None
        else:
            told = chat_logprobs(tokens, self._served) if self._asked.chat else choice.legacy(tokens)
        return {"index": choice.index, **content, "logprobs": told}

    @property
    def _chunk_object(self) -> str:
        return "chat.completion.chunk" if self._asked.chat else self._object

    def _chunk(self, choice: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        return self._reply(self._chunk_object, [choice | {"finish_reason": finish_reason}])

    def _reply(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._head["id"], "object": kind, **self._head, "choices": choices, "system_fingerprint": self._served.fingerprint}
