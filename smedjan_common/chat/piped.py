"""A talk without a terminal: each line that comes in is a message, each answer goes out on one line, as text or as JSON.

No prompt, no colour, no commands: what a program sends is never taken for anything but text.
"""

import itertools
import json
import sys
from collections.abc import Iterator
from typing import IO

from smedjan_common import streams
from smedjan_common.chat.answering import Answer, Answering
from smedjan_common.errors import DataError, reason

MAX_LINE_BYTES = 64 << 20  # more than any model takes: no endless line fills the memory


def run(answering: Answering, stream: IO[bytes], as_json: bool) -> int:
    """Answer every line of the stream that is not empty; the exit code. Raises SmedjanError.

    That a talk outgrows the context is told the first time: from there on every message pushes others out.
    """
    told = False

    def tell(note: str) -> None:
        nonlocal told
        if not told:
            streams.put(f"note: {note}", sys.stderr)
        told = True

    for line in _lines(stream):
        if text := line.rstrip("\r\n"):
            answering.talk.say(text)
            answer = answering.answer(lambda text: None, tell)
            if as_json:
                sys.stdout.write(json.dumps(values(answer), ensure_ascii=False) + "\n")
            else:
                shown = streams.harmless(answer.text) if sys.stdout.isatty() else answer.text
                sys.stdout.write(" ".join(shown.split("\n")) + "\n")
            sys.stdout.flush()
    return 0


def _lines(stream: IO[bytes]) -> Iterator[str]:
    """The lines as they come. Raises DataError for one that is no text or has no end."""
    for number in itertools.count(1):
        raw = stream.readline(MAX_LINE_BYTES + 1)
        if not raw:
            return
        if len(raw) > MAX_LINE_BYTES:
            what = f"Line {number} of standard input is too long."
            raise DataError(what, f"It has over {MAX_LINE_BYTES >> 20} MiB.", "A message is one line: send shorter ones.")
        try:
            yield raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"Line {number} of standard input is not UTF-8.", reason(error), "Convert it.") from None


def values(answer: Answer) -> dict[str, object]:
    """An answer as JSON. tokens_per_second: null where one token or none says nothing."""
    return {
        "role": "assistant",
        "content": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "cached_tokens": answer.cached_tokens,
        "completion_tokens": answer.tokens,
        "tokens_per_second": round(answer.speed, 2) if answer.speed else None,
    }
