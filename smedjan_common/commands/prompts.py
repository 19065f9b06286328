"""The prompts of `smedjan generate`: from flags, from files, from standard input."""

import contextlib
import json
import os
import select
import stat
import sys
from collections.abc import Sequence
from typing import Any

from smedjan_common import streams
from smedjan_common.errors import ConfigError, DataError

MAX_PROMPT_BYTES = 64 << 20  # no endless file, as /dev/zero is, fills the memory
STDIN = "-"
PATIENCE = 1.0  # seconds


def read_prompts(given: Sequence[str], file: str | None, prompts: str | None) -> list[str]:
    """The texts to continue. given: --prompt, each a text or - for standard input; file: --prompt-file, which is one prompt; prompts:
    --prompts, one a line. Without any, what is piped into the program, or the beginning of a document.

    Raises ConfigError where two of them are given, DataError for what is no text.
    """
    sources = {"--prompt": bool(given), "--prompt-file": file is not None, "--prompts": prompts is not None}
    if len(named := [name for name, there in sources.items() if there]) > 1:
        raise ConfigError(f"{named[0]} and {named[1]} are both given.", "Only one of them is used.", "Give one of them.")
    if file is not None:
        return [_read(file)]
    if prompts is not None:
        return _lines(_read(prompts), prompts)
    if given:
        return [_read(STDIN) if text == STDIN else text for text in given]
    return [_read(STDIN) if _is_piped() else ""]


def _read(source: str) -> str:
    if source == STDIN:
        _tell_where_nothing_comes()
    with contextlib.nullcontext(sys.stdin.buffer) if source == STDIN else open(source, "rb") as file:
        raw = file.read(MAX_PROMPT_BYTES + 1)
    if len(raw) > MAX_PROMPT_BYTES:
        why = f"It has over {MAX_PROMPT_BYTES >> 20} MiB, more than any model takes."
        raise DataError(f"The prompt in {source!r} is too long.", why, "Give a shorter text.")
    try:
        text = raw.decode("utf-8-sig")  # Windows' editors begin with a byte order mark
    except UnicodeDecodeError as error:
        raise DataError(f"The prompt in {source!r} is not UTF-8.", f"Byte {error.start} is no text.", "Convert the file.") from None
    return text.removesuffix("\n") if source == STDIN else text  # the line end of `echo`


def _tell_where_nothing_comes() -> None:
    """A note, soon, that standard input is waited for: who forgot the prompt would wait too."""
    with contextlib.suppress(OSError, ValueError, TypeError):  # it has no file
        if not select.select([sys.stdin], [], [], PATIENCE)[0]:
            streams.put("note: the prompt is read from standard input, until that ends.", sys.stderr)


def _lines(text: str, where: str) -> list[str]:
    """A prompt a line, empty ones left out; lines of JSON where the first one is an object."""
    lines = [(number, line) for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1) if line.strip()]
    if not lines:
        raise DataError(f"{where!r} has no prompts.", "Every line is empty.", "Write one prompt a line.")
    if not lines[0][1].lstrip().startswith("{"):
        return [line for _, line in lines]
    return [_field(number, line, where) for number, line in lines]


def _field(number: int, line: str, where: str) -> str:
    try:
        row: Any = json.loads(line)
        if isinstance(row, dict) and isinstance(row.get("prompt"), str):
            return row["prompt"]
        why = 'It is no object with a text called "prompt".'
    except (ValueError, RecursionError):
        why = "It is no JSON."
    raise DataError(f"Line {number} of {where!r} is no prompt.", why, 'Write {"prompt": "Once"} in each line, or plain text in all.')


def _is_piped() -> bool:
    """Whether standard input is a pipe or a file."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):  # closed, or replaced by something without a file
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)
