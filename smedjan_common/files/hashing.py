"""SHA-256 of a file, hexadecimal, in a little memory."""

import hashlib
import os
from typing import BinaryIO


def file_hash(path: str | os.PathLike) -> str:
    """Of a file's content. Raises OSError."""
    with open(path, "rb", buffering=0) as file:
        return rest_hash(file)


def rest_hash(file: BinaryIO) -> str:
    """Of what is left to read of an open file. Raises OSError."""
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # every binary file has readinto
