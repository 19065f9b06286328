"""A text that a person and a base model write together: what is typed is appended to it, and the model goes on.

A base model was trained on texts alone and has no turns; a text is what it can go on with. Of one that has outgrown the context it sees
the end, always a whole number of quarters of the context later, so that most of what was computed is used again.
"""

from typing import Any

from smedjan_common.chat.talk import Prompt
from smedjan_common.errors import DataError
from smedjan_common.tokenizer.base import BaseTokenizer


class Notebook:
    """parts: (text, whether the model wrote it) in their order. context: tokens that the model takes."""

    in_turns = False
    stop: tuple[str, ...] = ()
    strips = False

    def __init__(self, tokenizer: BaseTokenizer, context: int):
        self.tokenizer, self.context = tokenizer, context
        self.parts: list[tuple[str, bool]] = []
        self._told = False

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(text for text, _ in self.parts)

    @property
    def stop_ids(self) -> frozenset[int]:
        """The end of a text ends an answer."""
        return self.tokenizer.eos_ids

    @property
    def is_answered(self) -> bool:
        """Whether there is a text to go on with."""
        return bool(self.parts)

    def say(self, text: str) -> None:
        """What the user writes; nothing: the model goes on."""
        self.parts.append((text, False))

    def take(self, text: str) -> None:
        """What the model wrote."""
        self.parts.append((text, True))

    def prompt(self, room: int) -> Prompt:
        """The text, or its end, with `room` tokens left if that can be."""
        ids = self._ids()
        over = len(ids) + min(room, self.context // 4) - self.context
        if over <= 0:
            return Prompt(ids)
        step = max(self.context // 4, 1)
        note = "" if self._told else f"the text no longer fits into the context of {self.context:,} tokens: the model sees its end."
        self._told = True
        return Prompt(ids[-(-over // step) * step :] or ids[-1:], note)

    def length(self) -> int:
        """Tokens of the text."""
        return len(self._ids()) if self.parts else 0

    def take_back(self) -> str | None:
        """Forget what was typed last and what the model wrote after it; what was typed, None where there is nothing."""
        while self.parts:
            text, by_model = self.parts.pop()
            if not by_model:
                return text
        return None

    def take_answer_back(self) -> bool:
        """Forget what the model wrote last; False where there is nothing to go on from."""
        if self.parts and self.parts[-1][1]:
            self.parts.pop()
        return bool(self.parts)

    def reset(self) -> None:
        """Begin a new text."""
        self.parts, self._told = [], False

    def shown(self) -> str:
        """The text."""
        return self.text

    def values(self) -> dict[str, Any]:
        """As a file holds it."""
        return {"text": self.text}

    def restore(self, values: dict[str, Any]) -> None:
        """Take over what a file holds. Raises DataError."""
        if not isinstance(values.get("text"), str):
            raise DataError("The file holds no text.", "It may be a talk in turns.", "Give one that /save wrote, or take --template plain.")
        self.reset()
        self.parts = [(values["text"], False)]

    def _ids(self) -> list[int]:
        return self.tokenizer.begin(self.text)
