"""What every chat template gives: a talk in pieces, its ids, which of them a model writes itself, and where its answer ends.

Control tokens are ids that only the template writes: a message that spells <|im_end|> is text. Ids are cut at the border of prompt and
reply before BPE, so that a reply in the history has the ids that it is generated with.

messages: [{"role": "system" | "user" | "assistant" | "tool", "content": text}, …]
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from smedjan_common.errors import TemplateError
from smedjan_common.tokenizer.base import BaseTokenizer
from smedjan_common.tokenizer.chat_files import ChatSource

Message = Mapping[str, Any]
REFUSED = "refused"  # the case of a TemplateError about these messages; others are about the template
ROLES = ("system", "user", "assistant", "tool")


class Piece(NamedTuple):
    """A part of a talk. control: the name of a control token, else ordinary text; reply: what a model writes itself."""

    text: str
    control: bool = False
    reply: bool = False


class Span(NamedTuple):
    """ids[start:stop] are a reply, with the token that ends it."""

    start: int
    stop: int


class ChatTemplate:
    """A template. stop: texts that end an answer. strips: a space stands before a reply and is no part of it."""

    name: str
    stop: tuple[str, ...] = ()
    strips: bool = False

    def pieces(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[Piece]:
        """The talk, and the beginning of an answer. Raises TemplateError for messages that the template does not take."""
        raise NotImplementedError

    def labelled(self, messages: Sequence[Message]) -> list[Piece]:
        """The whole talk, with `reply` right for every piece. Raises TemplateError where that is not known."""
        return self.pieces(messages, False)

    def end_names(self) -> tuple[str, ...]:
        """The control tokens that end an answer, beside the tokenizer's end of text."""
        return ()

    def source(self) -> ChatSource | None:
        """The template as other programs read it; None where there is no such form."""
        return None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The talk as one text, control tokens by their names: for the eye, since `encode` alone tells them from text."""
        return "".join(piece.text for piece in self.pieces(messages, add_generation_prompt))

    def encode(
        self, tokenizer: BaseTokenizer, messages: Sequence[Message], add_generation_prompt: bool = True, continue_final: bool = False
    ) -> list[int]:
        """The ids to generate an answer from. continue_final: the last message is an answer to go on with, so its end is left out.

        Raises TemplateError.
        """
        if not continue_final:
            return encode_pieces(tokenizer, self.pieces(messages, add_generation_prompt))[0]
        *before, last = check_messages(messages)
        if last["role"] != "assistant":
            raise TemplateError("There is no answer to go on with.", f"The last message has the role {last['role']}.", "Leave it out.")
        reply = Piece(self.spaced(last["content"]), reply=True)
        return encode_pieces(tokenizer, [*self.pieces(before, True), reply])[0]

    def encode_turns(self, tokenizer: BaseTokenizer, messages: Sequence[Message]) -> tuple[list[int], list[Span]]:
        """The ids of a whole talk, and which of them are replies. Raises TemplateError."""
        return encode_pieces(tokenizer, self.labelled(messages))

    def stop_ids(self, tokenizer: BaseTokenizer) -> frozenset[int]:
        """The ids that end an answer: end of turn and end of text, as far as the tokenizer has them."""
        ends = (tokenizer.special_tokens[name] for name in self.end_names() if name in tokenizer.special_tokens)
        return tokenizer.eos_ids | frozenset(ends)

    def spaced(self, reply: str) -> str:
        """A reply as it stands in the text."""
        return f" {reply}" if self.strips and reply else reply


def check_messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Role and text of each message; developer is system. Raises TemplateError for what the built-in templates do not take."""
    checked = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            fix = 'Give a list of {"role": "user", "content": "…"}.'
            raise TemplateError(f"Message {number} is {message!r:.60}.", "A message has a role and a content.", fix, case=REFUSED)
        role, content = message.get("role"), message.get("content")
        role = "system" if role == "developer" else role
        if role not in ROLES:
            raise TemplateError(
                f"Message {number} has the role {role!r}.", f"Roles are {', '.join(ROLES)}.", "Give it one of these.", case=REFUSED
            )
        if message.get("tool_calls"):
            raise TemplateError(f"Message {number} has tool_calls.", "This template has no form for them.", "Leave them out.", case=REFUSED)
        if not isinstance(content, str):
            raise TemplateError(
                f"The content of message {number} is no text.", "This template takes text alone.", "Give it text.", case=REFUSED
            )
        checked.append({"role": role, "content": content})
    if not checked:
        raise TemplateError("There are no messages.", "A talk has at least one.", "Give one with the role user.")
    return checked


def encode_pieces(tokenizer: BaseTokenizer, pieces: Iterable[Piece]) -> tuple[list[int], list[Span]]:
    """Ids, and which of them are replies. Text is cut at control tokens and where a reply begins and ends, nowhere else."""
    ids: list[int] = []
    spans: list[Span] = []
    for reply, run in itertools.groupby(pieces, key=lambda piece: piece.reply):
        start = len(ids)
        for control, same in itertools.groupby(run, key=lambda piece: piece.control):
            texts = [piece.text for piece in same]
            ids += [tokenizer.special_tokens[name] for name in texts] if control else tokenizer.encode_ordinary("".join(texts))
        if reply and len(ids) > start:
            spans.append(Span(start, len(ids)))
    return ids, spans
