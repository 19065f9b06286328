"""Standard output and error as a command finds them: what is printed there never ends what is being done.

A terminal may lack a letter, a pipe may lose its reader, a disk that takes the output may be full, and a stream may be closed from the
start (`smedjan train … >&-`). Each costs the output at most.
"""

import contextlib
import io
import os
import select
import sys
from typing import Any

_RAISING = {"strict", "surrogateescape"}  # ways to encode that raise for a letter that an encoding lacks


def settle() -> None:
    """Make the standard streams safe to print to: letters that they lack are replaced, closed ones lead nowhere. Idempotent."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # else the next file that is opened gets its number, and what a library prints goes into that
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in _RAISING:
            stream.reconfigure(errors=errors)


def is_live(stream: Any) -> bool:
    """Whether a display can be drawn again and again on this stream: a terminal that can move its cursor, and no log of a CI."""
    return _is_terminal(stream) and not _is_set("CI")


def has_colours(stream: Any) -> bool:
    """Whether what is printed there may be coloured. NO_COLOR says no, FORCE_COLOR yes, even into a pipe; else a terminal has them."""
    if os.environ.get("NO_COLOR"):
        return False
    return _is_set("FORCE_COLOR") or _is_terminal(stream)


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty()) and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
    except (AttributeError, ValueError):  # a closed stream
        return False


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() not in ("", "0", "false", "no")


# Control characters as signs that a terminal only shows: those that move the cursor, colour, rename the window, or turn what follows around
_SIGNS = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: 0x2421,
    **dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD),
}


def harmless(text: str) -> str:
    """Text for a terminal, of a model or a stranger: of what could steer it (C0, C1, DEL, directions) there are only signs. Line ends
    and tabs stay."""
    return text.translate(_SIGNS)


def put(text: str, stream: Any) -> OSError | None:
    """Print a line to a standard stream at once. Where that cannot be, returns why, and the stream leads nowhere from then on."""
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        with contextlib.suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())  # what is buffered goes there too, or it would fail once more when the process ends
            os.close(null)
        return error
    return None


def put_now(text: str, stream: Any) -> bool:
    """Write a line past the stream's buffer and its lock, if that is possible without waiting; returns whether it was.

    For a thread that must not wait for the one that prints.
    """
    try:
        fd = stream.fileno()
        return bool(select.select([], [fd], [], 0)[1]) and os.write(fd, text.encode("ascii", "backslashreplace") + b"\n") > 0
    except (OSError, ValueError):  # closed, or no file at all
        return False
