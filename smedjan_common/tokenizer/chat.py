"""The chat template of a model: its own, or one that is built in. `from smedjan_common.tokenizer.chat import template_of`.

plain    User: …\\nAssistant: …, for models without control tokens; a talk is one document
chatml   <|im_start|>role\\n … <|im_end|>\\n, two control tokens around each turn (OpenAI, 2023)
jinja    the template of another project (chat_jinja.py); the two above need no Jinja
"""

import json
from collections.abc import Sequence
from pathlib import Path

from smedjan_common.errors import TemplateError, reason, unknown
from smedjan_common.files.names import TOKENIZER
from smedjan_common.files.regular import read_regular
from smedjan_common.tokenizer import chat_files
from smedjan_common.tokenizer.base import BaseTokenizer
from smedjan_common.tokenizer.chat_files import CHATML_JINJA, ChatSource
from smedjan_common.tokenizer.chat_template import ChatTemplate, Message, Piece, check_messages

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
_CHATML = {IM_START, IM_END}


class Plain(ChatTemplate):
    """Roles as words. A message that spells "\\nUser:" reads as a turn: without control tokens nothing can tell."""

    name, stop, strips = "plain", ("\nUser:",), True

    def __init__(self, tokenizer: BaseTokenizer):
        names = {number: name for name, number in tokenizer.special_tokens.items()}
        name = tokenizer.eot_name if tokenizer.bos_id is None else names.get(tokenizer.bos_id)
        self._begin = [Piece(name, control=True)] if name else []

    def pieces(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[Piece]:
        pieces = list(self._begin)
        for message in check_messages(messages):
            role, content = message["role"], message["content"]
            if role == "tool":
                raise TemplateError("The template plain has no turns of tools.", "A message has the role tool.", "Leave it out.")
            if role == "system":
                pieces.append(Piece(f"{content}\n\n"))
            elif role == "user":
                pieces.append(Piece(f"User: {content}\n"))
            else:
                pieces += [Piece("Assistant:"), Piece(self.spaced(content), reply=True), Piece("\n")]
        return [*pieces, Piece("Assistant:")] if add_generation_prompt else pieces


class ChatML(ChatTemplate):
    """It has no system text of its own."""

    name = "chatml"

    def pieces(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[Piece]:
        pieces = []
        for message in check_messages(messages):
            role, reply = message["role"], message["role"] == "assistant"
            pieces += [Piece(IM_START, control=True), Piece(f"{role}\n"), Piece(message["content"], reply=reply)]
            pieces += [Piece(IM_END, control=True, reply=reply), Piece("\n")]
        return [*pieces, Piece(IM_START, control=True), Piece("assistant\n")] if add_generation_prompt else pieces

    def end_names(self) -> tuple[str, ...]:
        return (IM_END,)

    def source(self) -> ChatSource | None:
        return ChatSource(CHATML_JINJA)


def template_of(folder: str | Path | None, tokenizer: BaseTokenizer) -> ChatTemplate | None:
    """The template of a checkpoint: chat_template.jinja beside its tokenizer, or the key in tokenizer_config.json; else chatml where the
    tokenizer has its two tokens; else None: a base model.

    folder: the checkpoint; None: what was beside the tokenizer when it was loaded. Raises TemplateError for one that cannot be used.
    """
    source = chat_files.read(Path(folder)) if folder is not None else tokenizer.chat
    if source is None:
        return ChatML() if tokenizer.special_tokens.keys() >= _CHATML else None
    if source.template.strip() == CHATML_JINJA:
        return _chatml(tokenizer)
    return _jinja(source, tokenizer)


def template_name(folder: Path) -> str | None:
    """What `template_of` a checkpoint is called: chatml, jinja, or none for a base model; read from its files, so nothing is loaded or
    compiled. None where there is no tokenizer.json. Raises TemplateError for files that cannot be read."""
    if (source := chat_files.read(folder)) is not None:
        return ChatML.name if source.template.strip() == CHATML_JINJA else "jinja"
    if not (folder / TOKENIZER).is_file():
        return None
    try:
        added = json.loads(read_regular(folder / TOKENIZER)).get("added_tokens") or []
        names = {token["content"] for token in added}
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise TemplateError(f"{folder / TOKENIZER} cannot be read.", reason(error), "Restore it from a copy.") from None
    return ChatML.name if names >= _CHATML else "none"


def named_template(name: str, folder: str | Path | None, tokenizer: BaseTokenizer) -> ChatTemplate | None:
    """The template that a user asks for: auto (the checkpoint's own), none, plain, chatml, or a file of Jinja. Raises TemplateError,
    ConfigError."""
    if name == "auto":
        return template_of(folder, tokenizer)
    if name in BUILT_IN:
        return BUILT_IN[name](tokenizer)
    if not Path(name).is_file():
        raise unknown("The chat template", name, ("auto", *BUILT_IN, "or a file"))
    own = chat_files.read(Path(folder)) if folder is not None else tokenizer.chat
    return _jinja(ChatSource(chat_files.read_text(Path(name)), own.specials if own else {}), tokenizer)


def _chatml(tokenizer: BaseTokenizer) -> ChatML:
    if lacking := _CHATML - tokenizer.special_tokens.keys():
        why = f"Its tokenizer has no {min(lacking)}."
        raise TemplateError("The template chatml does not fit this model.", why, "Take plain, which needs no control tokens.")
    return ChatML()


def _jinja(source: ChatSource, tokenizer: BaseTokenizer) -> ChatTemplate:
    from smedjan_common.tokenizer.chat_jinja import JinjaTemplate

    return JinjaTemplate(source, tokenizer)


BUILT_IN = {"none": lambda tokenizer: None, "plain": Plain, "chatml": _chatml}
