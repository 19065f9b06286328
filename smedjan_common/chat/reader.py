"""Reading what a user types: edited with readline, over several lines, remembered from one day to the next.

Several lines are put between three double quotes, or pasted: terminals mark what is pasted (bracketed paste), and GNU readline then takes
its line feeds as text. libedit, which macOS has instead, does not; there the quotes are the way.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from smedjan_common.chat.screen import Screen

QUOTES = '"""'
_KEPT = 1000  # entries of the history


class Reader:
    """Lines from the terminal. completions: words that the Tab key completes at the beginning of a line."""

    def __init__(self, screen: Screen, completions: Sequence[str] = (), history: Path | None = None):
        self._screen, self._history = screen, history
        self._readline = _readline()
        sys.stdin.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
        if self._readline:
            _set_up(self._readline, completions)
            for entry in read_history(history):
                self._readline.add_history(entry)

    def read(self, prompt: str) -> str | None:
        """What the user says next; None where the input ends. Raises KeyboardInterrupt."""
        text = self._line(prompt)
        if text is None or not text.startswith(QUOTES):
            return self._remember(text)
        text = text.removeprefix(QUOTES)
        while not text.rstrip().endswith(QUOTES):
            more = self._line("... ")
            if more is None:
                break
            text += f"\n{more}"
        return self._remember(text.rstrip().removesuffix(QUOTES).removeprefix("\n").removesuffix("\n"))

    def _line(self, prompt: str) -> str | None:
        shown = self._screen.styled(prompt, "prompt")
        if self._screen.has_colours and self._readline:  # readline must know what takes no room
            shown = shown.replace("\x1b[", "\x01\x1b[").replace("m", "m\x02")
        try:
            return input(shown)
        except EOFError:
            return None
        finally:
            self._screen.at_line_start()

    def _remember(self, text: str | None) -> str | None:
        if text and text.strip() and self._readline:
            self._readline.add_history(text)
            append_history(self._history, text)
        return text


def history_path() -> Path:
    """Where what was typed is kept: below XDG_STATE_HOME."""
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(base, "smedjan", "chat_history.jsonl")


def read_history(path: Path | None) -> list[str]:
    """The last entries, oldest first; none where the file cannot be read. It is cut to these where it has grown long."""
    try:
        lines = path.read_text("utf-8", errors="replace").rstrip("\n").split("\n") if path else []  # not U+2028, a letter of JSON
        if path and len(lines) > 2 * _KEPT:
            path.write_text("".join(f"{line}\n" for line in lines[-_KEPT:]), "utf-8")
    except OSError:
        return []
    entries = []
    for line in lines[-_KEPT:]:
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            entries += [entry] if isinstance(entry, str) else []
    return entries


def append_history(path: Path | None, text: str) -> None:
    """One more entry, a line of JSON. A history that cannot be written is no reason to stop."""
    if path is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a", encoding="utf-8", errors="replace") as file:
            file.write(json.dumps(text, ensure_ascii=False) + "\n")


def _readline() -> Any:
    """The module; None where Python was built without it."""
    try:
        import readline
    except ImportError:
        return None
    return readline


def _set_up(readline: Any, completions: Sequence[str]) -> None:
    readline.set_auto_history(False)
    readline.set_completer_delims(" ")
    readline.set_completer(_completer(completions, readline))
    if "libedit" in (readline.__doc__ or "") or getattr(readline, "backend", "") == "editline":
        readline.parse_and_bind("bind ^I rl_complete")
    else:
        readline.parse_and_bind("tab: complete")
        state = "off" if os.environ.get("TERM", "dumb") == "dumb" else "on"
        readline.parse_and_bind(f"set enable-bracketed-paste {state}")


def _completer(completions: Sequence[str], readline: Any) -> Callable[[str, int], str | None]:
    def complete(text: str, number: int) -> str | None:
        begins = readline.get_begidx() == 0 and text.startswith("/")
        found = [word for word in completions if word.startswith(text)] if begins else []
        return f"{found[number]} " if number < len(found) else None

    return complete
