"""Talks as files: JSON with the messages, as OpenAI's API and the page have them, or the text of a notebook."""

import json
from pathlib import Path
from typing import Any

from smedjan_common.errors import DataError, reason
from smedjan_common.files.atomic_file import write_atomically
from smedjan_common.nearby import beside

_MAX_BYTES = 64 << 20


def save(path: Path, talk: Any, model: str) -> None:
    """Write the talk, in place of what is there. Raises OSError."""
    values = {"format": "smedjan-talk", "model": model, **talk.values()}
    write_atomically(path, (json.dumps(values, ensure_ascii=False, indent=1) + "\n").encode("utf-8", "replace"))


def load(path: Path, talk: Any) -> None:
    """Read it into `talk`; a bare list counts as its messages. Raises DataError."""
    try:
        values = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{str(path)!r} is not a talk.", reason(error), "Give a file that /save wrote.") from None
    talk.restore({"messages": values} if isinstance(values, list) else values if isinstance(values, dict) else {})


def read_text(path: Path) -> str:
    """The text of a file. Raises DataError."""
    try:
        with open(path, "rb") as file:
            raw = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"Cannot read {str(path)!r}.", f"{error.strerror or error}.", beside(path) or "Check the path.") from None
    if len(raw) > _MAX_BYTES:
        raise DataError(f"{str(path)!r} is too long.", f"It has over {_MAX_BYTES >> 20} MiB.", "Give a shorter text.")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{str(path)!r} is not a text.", reason(error), "Convert it to UTF-8.") from None
