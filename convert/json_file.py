"""JSON files of other people, read with care, and ours, written to stay."""

import json
from pathlib import Path
from typing import Any

from smedjan_common.errors import CheckpointError
from smedjan_common.files.durable import sync

_MAX_BYTES = 256 << 20


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError naming the file."""
    try:
        with open(path, "rb") as file:
            raw = file.read(_MAX_BYTES + 1)
        values = json.loads(raw.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = (
            error.strerror
            if isinstance(error, OSError) and error.strerror
            else "nested too deeply"
            if isinstance(error, RecursionError)
            else f"it is not JSON ({error})"
        )
        raise CheckpointError(f"{path} cannot be read.", f"{why}.", "Download it again, or restore it from a copy.") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} does not hold a JSON object.", "It is JSON of another kind.", "Download it again.")
    return values


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write and sync a new file. Raises OSError."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write and sync a new file of text as it is. Raises OSError."""
    with open(path, "x", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        sync(file.fileno())
