"""The model that a server answers with, as far as requests and replies must know it: names, limits, tokenizer, chat template."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from smedjan_common.tokenizer import Tokenizer


class Template(Protocol):
    """What is asked of a chat template (tokenizer/chat.py). strips: a space stands before a reply and is no part of it."""

    name: str
    stop: tuple[str, ...]
    strips: bool

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, continue_final: bool = False
    ) -> list[int]:
        """The ids to generate an answer from."""
        ...

    def stop_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """The ids that end an answer."""
        ...


@dataclass(frozen=True)
class Served:
    """names: the first is the model's id, all of them are taken. created: Unix time. max_tokens: the most that a request may generate.

    at_once: sequences that may wait or be answered at a time, which is the most that one request can ask for. template: None refuses chat.
    """

    names: tuple[str, ...]
    created: int
    tokenizer: Tokenizer
    vocab_size: int
    context_length: int
    max_tokens: int | None = None
    at_once: int = 1 << 20
    template: Template | None = None
    fingerprint: str = ""  # of the weights' origin: changes with the checkpoint
    about: Mapping[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def longest_token(self) -> int:
        """Bytes of the longest token: a text of n bytes has at least n / longest_token tokens."""
        return max(1, int(self.tokenizer.token_bytes().max()))

    @functools.cached_property
    def control(self) -> dict[int, str]:
        """Control tokens: id -> name."""
        return {number: name for name, number in self.tokenizer.special_tokens.items()}

    def describe(self, name: str) -> dict[str, Any]:
        """The model in the list of models."""
        told = {"max_model_len": self.context_length, "chat_template": self.template.name if self.template else None, **self.about}
        return {"id": name, "object": "model", "created": self.created, "owned_by": "smedjan", **told}
