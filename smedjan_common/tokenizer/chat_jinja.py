"""Chat templates of other projects: Jinja, rendered as transformers renders them, in a sandbox and within limits.

A template is a program of strangers. It sees JSON values and nothing of Python, and what it may take is bounded: 64 KiB of text, a
number of lines that are executed, 16 MiB that it writes, no huge strings on the way.

Special tokens are ids where the template writes them and text where a message spells them: every name in a message gets a mark, a
private-use character that occurs nowhere else, before it is rendered. Names without a mark become ids; then the marks are taken away.

The package jinja2 (extra `chat`) is needed; before 3.1.6 its sandbox could be left.
"""

import functools
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from smedjan_common.errors import TemplateError
from smedjan_common.tokenizer.base import BaseTokenizer
from smedjan_common.tokenizer.chat_files import ChatSource
from smedjan_common.tokenizer.chat_template import REFUSED, ChatTemplate, Message, Piece

_PRIVATE = range(0xE000, 0xF900)
_PROBE = "probeanswer"  # plain letters, which no template changes


class JinjaTemplate(ChatTemplate):
    """A template of Hugging Face's kind. Made and rendered once at the start: one that cannot be used is refused then."""

    name = "jinja"

    def __init__(self, source: ChatSource, tokenizer: BaseTokenizer):
        """Raises TemplateError."""
        self._source = source
        self._names = sorted(tokenizer.special_tokens, key=len, reverse=True)
        eos = {"eos_token": tokenizer.eot_name} if tokenizer.eot_name else {}
        self._specials = {**eos, **source.specials}
        self._template = _compiled(source.template)
        self._ends, self.stop = self._find_end()

    def source(self) -> ChatSource | None:
        return self._source

    def end_names(self) -> tuple[str, ...]:
        return self._ends

    def pieces(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[Piece]:
        mark, marked = self._marked(messages)
        return self._cut(self._run(marked, add_generation_prompt), mark)

    def labelled(self, messages: Sequence[Message]) -> list[Piece]:
        """Replies are found by what each message adds to the text. Raises TemplateError for a template that changes earlier turns."""
        mark, marked = self._marked(messages)
        whole, pieces, done = self._run(marked, False), [], ""
        for number, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            if number == 0:  # templates look at the first message, and fail where there is none
                raise TemplateError("The talk begins with an answer.", "No template asks for one.", "Begin with a question.", case=REFUSED)
            before, after = self._run(marked[:number], True), self._run(marked[: number + 1], False)
            if not (before.startswith(done) and after.startswith(before) and whole.startswith(after)):
                why = f"Its text before message {number + 1} is not the beginning of the text after it."
                raise TemplateError("The chat template changes earlier turns.", why, "Give one answer a talk, as the last message.")
            reply, tail = self._ended(self._cut(after[len(before) :], mark))
            pieces += [*self._cut(before[len(done) :], mark), *reply, *tail]
            done = after
        return pieces + self._cut(whole[len(done) :], mark)

    def _ended(self, added: list[Piece]) -> tuple[list[Piece], list[Piece]]:
        """What a message added, cut after its last control token: a reply with its end, and what stands after it."""
        last = max((number for number, piece in enumerate(added) if piece.control), default=len(added) - 1)
        return [piece._replace(reply=True) for piece in added[: last + 1]], added[last + 1 :]

    def _run(self, messages: Sequence[Any], add_generation_prompt: bool) -> str:
        variables = {"tools": None, "documents": None, **self._specials}
        return _render(self._template, {**variables, "messages": messages, "add_generation_prompt": add_generation_prompt})

    def _marked(self, messages: Sequence[Message]) -> tuple[str, list[Any]]:
        """A mark, and the messages with it before every name of a special token in their texts; roles stay as they are."""
        plain = [_plain(message) for message in messages]
        text = json.dumps(plain, ensure_ascii=False) + self._source.template
        mark = next(chr(number) for number in _PRIVATE if chr(number) not in text)
        if not self._names:
            return mark, plain
        found = re.compile(f"(?={'|'.join(map(re.escape, self._names))})")
        return mark, [_each_text(message, lambda text: found.sub(mark, text)) for message in plain]

    def _cut(self, text: str, mark: str) -> list[Piece]:
        """The text in pieces: the names without a mark are control tokens."""
        if not self._names:
            return [Piece(text)] if text else []
        parts = re.split(f"(?<!{mark})({'|'.join(map(re.escape, self._names))})", text)
        pieces = [Piece(part.replace(mark, ""), control=number % 2 == 1) for number, part in enumerate(parts)]
        return [piece for piece in pieces if piece.text]

    def _find_end(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(the control token after an answer, or the text before the next question where no token is there). It is found by a trial,
        which also shows whether the template works at all."""
        question = {"role": "user", "content": "question"}
        pieces = self.pieces([question, {"role": "assistant", "content": _PROBE}, question], True)
        at = next((number for number, piece in enumerate(pieces) if _PROBE in piece.text and not piece.control), None)
        if at is None:
            raise _refusal("It leaves out what an assistant says.")
        rest = pieces[at].text.partition(_PROBE)[2]
        if "question" not in rest:
            end = next((piece.text for piece in pieces[at + 1 :] if piece.control), None)
            return ((end,) if end else ()), ()
        return (), tuple(filter(None, [rest.partition("question")[0].rstrip()]))


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    """The value with every text in it changed, but the roles and the names of fields."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_each_text(part, change) for part in value]
    if isinstance(value, dict):
        return {key: part if key == "role" else _each_text(part, change) for key, part in value.items()}
    return value


def _plain(value: Any) -> Any:
    """JSON values alone: nothing with methods of its own reaches the template. Raises TemplateError."""
    try:
        return json.loads(json.dumps(value, ensure_ascii=False))
    except (TypeError, ValueError, RecursionError):
        fix = "Give texts, lists and objects."
        raise TemplateError("A message is not made of JSON values.", "A template takes nothing else.", fix) from None


@functools.lru_cache(maxsize=16)
def _compiled(text: str) -> Any:
    """The template. Raises TemplateError."""
    sandbox = _sandbox()
    try:
        return sandbox.environment().from_string(text)
    except Exception as error:  # whatever the text of a stranger makes the compiler do
        raise _refusal(f"It is no template: {_short(error)}.") from None


def _render(template: Any, variables: dict[str, Any]) -> str:
    """The text of a talk. Raises TemplateError."""
    sandbox, parts, size = _sandbox(), [], 0
    try:
        with sandbox.counted_lines():
            for part in template.generate(**variables):
                parts.append(part)
                size += len(part)
                if size > sandbox.MAX_SIZE:
                    raise sandbox.TooMuchError("it writes too much")
    except sandbox.TooMuchError as error:
        raise _refusal(f"It takes more than a talk can need: {error}.") from None
    except Exception as error:  # whatever the program of a stranger runs into
        if type(error) is sandbox.jinja2.TemplateError:  # raise_exception
            why = f"It says: {_short(error)}."
            raise TemplateError("The chat template refuses these messages.", why, "Change the messages.", case=REFUSED) from None
        raise _refusal(f"It fails: {_short(error)}.") from None
    return "".join(parts)


def _sandbox() -> Any:
    """The file that needs jinja2. Raises TemplateError where there is none, or one that is too old."""
    try:
        from smedjan_common.tokenizer import chat_sandbox
    except ImportError:
        raise TemplateError("The chat template needs jinja2.", "It is a program in Jinja.", _INSTALL) from None
    if chat_sandbox.version() < chat_sandbox.LEAST_VERSION:
        least = ".".join(map(str, chat_sandbox.LEAST_VERSION))
        why = "Templates could leave the sandbox of older ones."
        raise TemplateError(f"The chat template needs jinja2 {least} or newer.", why, _INSTALL)
    return chat_sandbox


_INSTALL = "Install it: pip install 'smedjan[chat]'; or name another template: plain, say."


def _refusal(why: str) -> TemplateError:
    return TemplateError("The chat template cannot be used.", why, "Name another one: plain, chatml, or a file.")


def _short(error: Exception) -> str:
    """What the program says, on one line, without control characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(character if character.isprintable() else "?" for character in text[:200]).rstrip(".")
