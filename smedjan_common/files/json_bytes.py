"""JSON as bytes of a file: names that the system gives may hold bytes that are no text, and must not end the work at its last line."""

import json
from typing import Any


def json_bytes(value: Any, indent: int | None = None) -> bytes:
    """UTF-8; lone surrogates, as which Python holds the bytes of a name that is no UTF-8, as escapes that read back as they were."""
    return json.dumps(value, indent=indent, ensure_ascii=False).encode("utf-8", "backslashreplace")
