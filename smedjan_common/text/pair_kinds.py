"""The kinds of rows that say which of two answers is better, known by their keys, and how each is read: a row of PAIR_KINDS for each.

    OpenAI      {"input": {"messages": […]}, "preferred_output": […], "non_preferred_output": […]}
    ms-swift    {"messages": […, {"role": "assistant", …}], "rejected_response": "…"}, or "rejected_messages": a whole conversation
    explicit    {"prompt" | "question" | "instruction", "chosen", "rejected"}: texts, or lists of messages; "input" and "system" as well
    implicit    {"chosen", "rejected"}: two conversations that begin alike, or two texts with turns of Human: and Assistant: (HH)

What both conversations begin with is the question; it is found message by message, never by characters, which would cut words and so
change the tokens of both answers (TRL does so with texts). Where `prompt` is a text and chosen and rejected begin with a question of
their own, that one counts (UltraFeedback), or it would stand there twice.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from smedjan_common.text.talk_kinds import (
    ASSISTANT,
    KINDS,
    Row,
    Said,
    TalkKind,
    UselessRowError,
    WrongRowError,
    as_text,
    has,
    is_kto,
    shown,
    turns,
    with_system,
)

_PROMPTS = ("prompt", "question", "instruction")
_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")  # of Anthropic's HH texts


class Preferred(NamedTuple):
    """Two conversations that begin alike and end in different answers. What they share is not trained."""

    chosen: Said
    rejected: Said


def paired(chosen: Said, rejected: Said) -> Preferred:
    """Two conversations as one question and two answers to it. Raises UselessRowError."""
    same = _shared(chosen.messages, rejected.messages)
    rests = chosen.messages[same:], rejected.messages[same:]
    if not any(rests):
        raise UselessRowError("the two answers are the same")
    if not all(rest and rest[-1]["role"] == ASSISTANT for rest in rests):
        raise UselessRowError("no answer of an assistant at the end of both")
    if not all(rest[0]["role"] == ASSISTANT for rest in rests):
        raise UselessRowError("the two answer different questions")
    if not same:
        raise UselessRowError("the answers have no question")
    return Preferred(*(Said(talk.messages, [False] * same + talk.trained[same:]) for talk in (chosen, rejected)))


def _shared(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> int:
    """How many messages both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _of_openai(row: Row) -> Preferred:
    given = row["input"]
    if not isinstance(given, Mapping) or "messages" not in given:
        raise WrongRowError(f"Its input is {shown(given)}, not an object with messages.")
    if given.get("tools"):
        raise UselessRowError("it offers tools, which no template here is told of")
    question = turns(given["messages"])
    return paired(*(_after(question, _answer(name, row[name])) for name in ("preferred_output", "non_preferred_output")))


def _of_swift(row: Row) -> Preferred:
    if row.get("tools"):
        raise UselessRowError("it offers tools, which no template here is told of")
    chosen = turns(row["messages"])
    if "rejected_messages" in row:
        return paired(chosen, turns(row["rejected_messages"]))
    if not chosen.messages or chosen.messages[-1]["role"] != ASSISTANT:
        raise UselessRowError("no answer of an assistant at the end of both")
    question = Said(chosen.messages[:-1], chosen.trained[:-1])
    return paired(chosen, _after(question, _answer("rejected_response", row["rejected_response"])))


def _of_explicit(row: Row) -> Preferred:
    question, chosen, rejected = _question(row), row["chosen"], row["rejected"]
    if isinstance(question, str):
        if all(isinstance(side, list) and _asks(side) for side in (chosen, rejected)):
            return _of_implicit(row)  # UltraFeedback
        asked = _human(question) or Said([{"role": "user", "content": question}], [True])
    else:
        asked = turns(question)
    sides = []
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        answer = _answer(name, side)
        whole = asked.messages and answer.messages[: len(asked.messages)] == asked.messages  # the question stands there again
        sides.append(with_system(row, answer if whole else _after(asked, answer)))
    return paired(*sides)


def _of_implicit(row: Row) -> Preferred:
    sides = []
    for name in ("chosen", "rejected"):
        talk = _human(row[name]) if isinstance(row[name], str) else turns(row[name])
        if talk is None:
            why = "It is a text without turns of Human: and Assistant:, and there is no prompt beside it."
            raise WrongRowError(f"Its {name} does not say what was asked. {why}")
        sides.append(with_system(row, talk))
    return paired(*sides)


def _question(row: Row) -> Any:
    """A text, or a list of messages."""
    name = next(key for key in _PROMPTS if key in row)
    question = row[name]
    if isinstance(question, list):
        return question
    text = as_text(name, question)
    return f"{text}\n\n{as_text('input', row['input'])}" if name == "instruction" and row.get("input") else text


def _answer(name: str, value: Any) -> Said:
    """An answer: a text, a message, or a list of messages."""
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, list):
        return turns(value)
    text = as_text(name, "" if value is None else value)
    return Said([{"role": ASSISTANT, "content": text}], [True])


def _after(question: Said, answer: Said) -> Said:
    return Said(question.messages + answer.messages, question.trained + answer.trained)


def _asks(messages: list[Any]) -> bool:
    """Whether a list begins with something else than an answer."""
    return bool(messages) and (read := turns(messages[:1]).messages) != [] and read[0]["role"] != ASSISTANT


def _human(text: str) -> Said | None:
    """A text with turns of Human: and Assistant:, without the empty one that an answer follows; None where there are none."""
    names = list(_TURN.finditer(text))
    if not names or text[: names[0].start()].strip():
        return None
    ends = [found.start() for found in names[1:]] + [len(text)]
    roles = {"Human": "user", "Assistant": ASSISTANT}
    messages = [{"role": roles[found[1]], "content": text[found.end() : end].strip()} for found, end in zip(names, ends, strict=True)]
    if messages[-1] == {"role": ASSISTANT, "content": ""} and len(messages) > 1 and messages[-2]["role"] == "user":
        messages.pop()
    return Said(messages, [True] * len(messages))


def _has_prompt(row: Row) -> bool:
    return "chosen" in row and "rejected" in row and any(key in row for key in _PROMPTS)


_WITH_SFT = "A row has one answer, and nothing says what is worse. Learn from it with smedjan sft."
PAIR_KINDS = (
    TalkKind("OpenAI's preferences", has("input", "preferred_output", "non_preferred_output"), _of_openai),
    TalkKind(
        "ms-swift's preferences", lambda row: "messages" in row and bool({"rejected_response", "rejected_messages"} & row.keys()), _of_swift
    ),
    TalkKind("preferences with a prompt", _has_prompt, _of_explicit),
    TalkKind("preferences", has("chosen", "rejected"), _of_implicit),
    TalkKind("KTO", is_kto, refused="Its answers are single, good or bad. Join a good and a bad one: prompt, chosen, rejected."),
    *(TalkKind(kind.name, kind.fits, refused=_WITH_SFT) for kind in KINDS if kind.read),
    TalkKind("text", has("text"), refused="It has no answers. Go on training with it: smedjan train --pretrained."),
)
