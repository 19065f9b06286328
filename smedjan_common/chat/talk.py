"""A talk in turns: what was said, as messages, and the prompt that they come to within the model's context.

When a talk outgrows the context the oldest turns are left out of the prompt, a question always together with its answers; the system text
stays. They stay in the talk: /save and /context have them.
"""

from typing import Any, NamedTuple

from smedjan_common.errors import ConfigError, DataError
from smedjan_common.tokenizer.base import BaseTokenizer
from smedjan_common.tokenizer.chat_template import ChatTemplate

TURNS = ("user", "assistant")


class Prompt(NamedTuple):
    """What a model goes on from. note: what of it had to be left out, in a sentence."""

    ids: list[int]
    note: str = ""


class Talk:
    """messages: user and assistant in turns, without the system text. context: tokens that the model takes."""

    in_turns = True

    def __init__(self, tokenizer: BaseTokenizer, template: ChatTemplate, context: int, system: str = ""):
        self.tokenizer, self.template, self.context, self.system = tokenizer, template, context, system
        self.messages: list[dict[str, str]] = []
        self._left_out = 0  # messages that no longer fit

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return self.template.stop

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return self.template.stop_ids(self.tokenizer)

    @property
    def strips(self) -> bool:
        """Whether white space before an answer is no part of it."""
        return self.template.strips and not self.is_answered

    @property
    def is_answered(self) -> bool:
        """Whether the last message is an answer: to go on is to lengthen it."""
        return bool(self.messages) and self.messages[-1]["role"] == "assistant"

    def say(self, text: str) -> None:
        """What the user says."""
        self.messages.append({"role": "user", "content": text})

    def take(self, text: str) -> None:
        """What the model said: a new answer, or more of the last one."""
        if self.is_answered:
            self.messages[-1]["content"] += text
        else:
            self.messages.append({"role": "assistant", "content": text})

    def prompt(self, room: int) -> Prompt:
        """The prompt for the next answer, with `room` tokens left for it if that can be. Raises ConfigError, TemplateError."""
        begin, ids = self._left_out, self._ids(self._left_out)
        while len(ids) + room > self.context and (after := self._next_question(begin)) is not None:
            begin, ids = after, self._ids(after)
        if len(ids) >= self.context:
            what = f"The last message makes a prompt of {len(ids):,} tokens."
            raise ConfigError(what, f"The model takes {self.context:,}.", "Shorten it, or take a model with a longer context.")
        new, self._left_out = begin - self._left_out, begin
        if not new:
            return Prompt(ids)
        turns = "message no longer fits" if new == 1 else "messages no longer fit"
        return Prompt(ids, f"the oldest {new} {turns} into the context of {self.context:,} tokens: the model does not see them any more.")

    def length(self) -> int:
        """Tokens of the talk as it is, without what is left out."""
        return len(self._ids(self._left_out)) if self.messages or self.system else 0

    def take_back(self) -> str | None:
        """Forget the last question and its answer; the question, None where there is none."""
        while self.messages:
            message = self.messages.pop()
            if message["role"] == "user":
                self._left_out = min(self._left_out, max(len(self.messages) - 1, 0))
                return message["content"]
        return None

    def take_answer_back(self) -> bool:
        """Forget the last answer; False where there is none."""
        if self.is_answered:
            self.messages.pop()
        return bool(self.messages)

    def reset(self) -> None:
        """Forget everything but the system text."""
        self.messages, self._left_out = [], 0

    def shown(self) -> str:
        """What the model sees, control tokens by their names."""
        seen = self._seen(self._left_out)
        return self.template.render(seen, add_generation_prompt=False) if seen else ""

    def values(self) -> dict[str, Any]:
        """As a file holds it."""
        return {"messages": self._all()}

    def restore(self, values: dict[str, Any]) -> None:
        """Take over what a file holds. Raises DataError."""
        messages = values.get("messages")
        if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
            raise DataError(
                "The file holds no talk.", "It has no list of messages with a role and a content.", "Give one that /save wrote."
            )
        self.system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
        self.messages = [{"role": message["role"], "content": message["content"]} for message in messages if message["role"] != "system"]
        self._left_out = 0

    def _all(self) -> list[dict[str, str]]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages]

    def _seen(self, begin: int) -> list[dict[str, str]]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages[begin:]]

    def _ids(self, begin: int) -> list[int]:
        return self.template.encode(self.tokenizer, self._seen(begin), continue_final=self.is_answered)

    def _next_question(self, begin: int) -> int | None:
        """Where the turn after that of message `begin` begins; the last question is never left out."""
        questions = (at for at in range(begin + 1, len(self.messages)) if self.messages[at]["role"] == "user")
        return next(questions, None)


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") in (*TURNS, "system") and isinstance(message.get("content"), str)
