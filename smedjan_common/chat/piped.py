"""A talk without a terminal: each line that comes in is a message, each answer goes out on one line, as text or as JSON.

No prompt, no colour, no commands: what a program sends is never taken for anything but text.
"""

import json
import sys
from collections.abc import Iterable

from smedjan_common import streams
from smedjan_common.chat.answering import Answer, Answering


def run(answering: Answering, lines: Iterable[str], as_json: bool) -> int:
    """Answer every line that is not empty; the exit code. Raises SmedjanError."""
    for line in lines:
        if text := line.rstrip("\r\n"):
            answering.talk.say(text)
            answer = answering.answer(lambda text: None, _told)
            if as_json:
                sys.stdout.write(json.dumps(values(answer), ensure_ascii=False) + "\n")
            else:
                shown = streams.harmless(answer.text) if sys.stdout.isatty() else answer.text
                sys.stdout.write(" ".join(shown.split("\n")) + "\n")
            sys.stdout.flush()
    return 0


def values(answer: Answer) -> dict[str, object]:
    """An answer as JSON. tokens_per_second: null where one token or none says nothing."""
    return {
        "role": "assistant",
        "content": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.tokens,
        "tokens_per_second": round(answer.speed, 2) if answer.speed else None,
    }


def _told(note: str) -> None:
    streams.put(f"note: {note}", sys.stderr)
