"""The kinds of rows that hold conversations, known by their keys, and how each is read: a row of KINDS for each.

    messages            {"messages": [{"role", "content"}, …]}; "weight" 0, "train" false: this answer is not trained (OpenAI, axolotl)
    ShareGPT            {"conversations": [{"from", "value"}, …]}, and the same with role and content
    prompt/completion   {"prompt", "completion" | "response" | "answer" | "output"}, {"question", "answer"}: texts, or lists of messages
    Alpaca              {"instruction", "output"}, "input", "system" and "history" as well where they are there
    preference, KTO, text   known, and refused by name: they are no conversations to learn answers from (pairs: pair_kinds.py)

A row of the wrong shape is an error; a row of the right shape that teaches nothing is useless, with a reason.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]
ASSISTANT = "assistant"
_ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys((ASSISTANT, "gpt", "chatgpt", "bing", "bard", "model"), ASSISTANT),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
_COMPLETIONS = ("completion", "response", "answer", "output")
_KEPT = ("name", "tool_calls", "tool_call_id")  # keys of a message that templates of others read
_SWITCHES = ("weight", "train", "training")  # of a message: 0 or false leaves it out of the loss


class WrongRowError(Exception):
    """A row that has not the shape of its kind. Its text is a sentence."""


class UselessRowError(Exception):
    """A row of the right shape that teaches nothing. Its text is the reason, by which such rows are counted."""


class Said(NamedTuple):
    """A conversation: messages {"role", "content"}, and of each whether it is trained, which counts for answers alone."""

    messages: list[dict[str, Any]]
    trained: list[bool]


class TalkKind(NamedTuple):
    """name; `fits` says by the keys of a row whether it is of this kind; `read` gives what it says (Said; Preferred of
    pairs), None: `refused` says why not."""

    name: str
    fits: Callable[[Row], bool]
    read: Callable[[Row], Any] | None = None
    refused: str = ""


def kind_of_row(row: Row, kinds: Sequence[TalkKind]) -> TalkKind | None:
    """The first kind, the most specific ones first, whose keys the row has."""
    return next((kind for kind in kinds if kind.fits(row)), None)


def said(messages: Any, role: str = "role", content: str = "content") -> Said:
    """A list of messages. Raises WrongRowError, UselessRowError."""
    if not isinstance(messages, list):
        raise WrongRowError(f"Its messages are {shown(messages)}, not a list.")
    read, trained = [], []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or role not in message:
            raise WrongRowError(f"Message {number} is {shown(message)}, not an object with {role} and {content}.")
        read.append(_message(number, message, role, content))
        trained.append(_is_trained(number, message))
    return Said(read, trained)


def _message(number: int, message: Row, role: str, content: str) -> dict[str, Any]:
    who = message[role]
    if not isinstance(who, str):
        raise WrongRowError(f"The {role} of message {number} is {shown(who)}, not a text.")
    if who.lower() not in _ROLES:
        raise UselessRowError(f"the role {who[:20]!r} is not known")
    kept = {key: message[key] for key in _KEPT if message.get(key)}
    return {"role": _ROLES[who.lower()], "content": _text(number, message.get(content), bool(kept.get("tool_calls"))), **kept}


def _text(number: int, content: Any, may_lack: bool) -> str:
    """The text of a message: a text, or parts of which each is one."""
    if isinstance(content, str):
        return content
    if content is None and may_lack:
        return ""
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        if not all(part.get("type") == "text" and isinstance(part.get("text"), str) for part in content):
            raise UselessRowError("a message has a part that is no text")
        return "".join(part["text"] for part in content)
    raise WrongRowError(f"The content of message {number} is {shown(content)}, not a text.")


def _is_trained(number: int, message: Row) -> bool:
    for name in _SWITCHES:
        value = message.get(name)
        if value is not None and value not in (0, 1):
            raise WrongRowError(f"The {name} of message {number} is {shown(value)}, neither 0 nor 1.")
        if value is not None and not value:
            return False
    return True


def _of_messages(row: Row) -> Said:
    if row.get("tools"):
        raise UselessRowError("it offers tools, which no template here is told of")
    return said(row["messages"])


def _of_sharegpt(row: Row) -> Said:
    return with_system(row, turns(row["conversations"]))


def turns(messages: Any) -> Said:
    """A list of messages with role and content, or with from and value. Raises WrongRowError, UselessRowError."""
    keys = {key for turn in messages if isinstance(turn, Mapping) for key in turn} if isinstance(messages, list) else set()
    named = "role" in keys or "from" not in keys
    return said(messages) if named else said(messages, "from", "value")


def _of_prompt(row: Row) -> Said:
    question = row["prompt"] if "prompt" in row else row["question"]
    answer = next(row[key] for key in _COMPLETIONS if key in row)
    if isinstance(question, list) and isinstance(answer, list):
        before, after = said(question), said(answer)
        return Said(before.messages + after.messages, [False] * len(before.trained) + after.trained)
    return with_system(row, _pair(question, answer))


def _of_alpaca(row: Row) -> Said:
    question = row["instruction"]
    if row.get("input"):
        question = f"{as_text('instruction', question)}\n\n{as_text('input', row['input'])}"
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise WrongRowError(f"Its history is {shown(history)}, not a list of pairs.")
    parts = [_pair(*turn) for turn in history] + [_pair(question, row["output"])]
    return with_system(row, Said([one for part in parts for one in part.messages], [one for part in parts for one in part.trained]))


def _pair(question: Any, answer: Any) -> Said:
    messages = [
        {"role": "user", "content": as_text("prompt", question)},
        {"role": ASSISTANT, "content": as_text("answer", "" if answer is None else answer)},
    ]
    return Said(messages, [True, True])


def with_system(row: Row, talk: Said) -> Said:
    """The talk after the system text of its row, where it has one of its own."""
    system = row.get("system")
    if not isinstance(system, str) or not system or (talk.messages and talk.messages[0]["role"] == "system"):
        return talk
    return Said([{"role": "system", "content": system}, *talk.messages], [True, *talk.trained])


def as_text(name: str, value: Any) -> str:
    """`value`, which is a text. Raises WrongRowError."""
    if not isinstance(value, str):
        raise WrongRowError(f"Its {name} is {shown(value)}, not a text.")
    return value


def shown(value: Any) -> str:
    """A value as its file has it."""
    return "missing" if value is None else json.dumps(value, ensure_ascii=False, default=str)[:40]


def has(*keys: str) -> Callable[[Row], bool]:
    """Whether a row has all these keys."""
    return lambda row: all(key in row for key in keys)


def _is_preference(row: Row) -> bool:
    """Pairs, which pair_kinds.py reads."""
    sets = (
        ("chosen", "rejected"),
        ("preferred_output", "non_preferred_output"),
        ("messages", "rejected_response"),
        ("messages", "rejected_messages"),
    )
    return any(all(key in row for key in keys) for keys in sets)


def _is_prompt(row: Row) -> bool:
    return ("prompt" in row and any(key in row for key in _COMPLETIONS)) or ("question" in row and "answer" in row)


_ONE_SIDE = "Leave the answers that were preferred, as prompt and completion"
is_kto = has("prompt", "completion", "label")
KINDS = (
    TalkKind("preference pairs", _is_preference, refused="They say which of two answers is better. Learn from them with smedjan dpo."),
    TalkKind("KTO", is_kto, refused=f"Its labels say which answers are good. {_ONE_SIDE}."),
    TalkKind("messages", has("messages"), _of_messages),
    TalkKind("ShareGPT", has("conversations"), _of_sharegpt),
    TalkKind("prompt/completion", _is_prompt, _of_prompt),
    TalkKind("Alpaca", has("instruction", "output"), _of_alpaca),
    TalkKind("text", has("text"), refused="It has no questions and answers. Go on training with it: smedjan train --pretrained."),
)
