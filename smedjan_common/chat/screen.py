"""What is written to a terminal: the model's text without control characters, everything else in colours if those are wanted."""

import sys
from typing import Any

from smedjan_common.streams import harmless, has_colours

_STYLES = {"dim": "2", "bold": "1", "prompt": "1;36", "error": "31"}


class Screen:
    """out: where text goes, standard output if not given."""

    def __init__(self, out: Any = None):
        self.out = sys.stdout if out is None else out
        self.is_terminal = self.out.isatty()
        self.has_colours = has_colours(self.out)
        self._column = 0

    def model(self, text: str) -> None:
        """Text of the model, at once."""
        shown = harmless(text) if self.is_terminal else text
        self._write(shown)

    def line(self, text: str = "", style: str = "") -> None:
        """A line of our own, on a line of its own."""
        self.end_line()
        self._write(f"{self.styled(text, style)}\n")

    def end_line(self) -> None:
        """Begin a new line unless this is the beginning of one."""
        if self._column:
            self._write("\n")

    def styled(self, text: str, style: str) -> str:
        """In a style, where there are colours."""
        return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if style and text and self.has_colours else text

    def at_line_start(self) -> None:
        """The user ended the line."""
        self._column = 0

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()
        after = text.rpartition("\n")
        self._column = len(after[2]) if after[1] else self._column + len(text)
