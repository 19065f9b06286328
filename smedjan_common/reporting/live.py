"""The display of a run on a terminal, drawn by rich a few times a second beneath the lines that are printed. rich is imported only here.

The cursor is never hidden, so that a process that is killed leaves a terminal as it should be. No line of the display is wider than
WIDEST, so that a terminal that is made narrower does not break it. What is printed meanwhile, on standard error too, goes through the one
writer; a terminal that is gone costs the display and not the run.
"""

import contextlib
import sys
from typing import Any, TextIO

from smedjan_common.reporting.pace import Pace
from smedjan_common.reporting.screen import Screen
from smedjan_common.reporting.status import Status
from smedjan_common.streams import is_live

WIDEST, A_SECOND = 100, 4


class LiveScreen(Screen):
    """The display, a context."""

    drawn = True

    def __init__(self, status: Status, pace: Pace):
        super().__init__(status, pace)
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        class Writer(Console):
            """What is printed and what is drawn take turns: rich moves up by the height that the display had when a line was begun."""

            turn: Any = contextlib.nullcontext()

            def show_cursor(self, show: bool = True) -> bool:
                return False

            def __enter__(self) -> Console:
                self.turn.__enter__()
                return super().__enter__()

            def __exit__(self, *error: Any) -> None:
                try:
                    super().__exit__(*error)
                finally:
                    self.turn.__exit__(*error)

        self._text = Text
        self._stream = _Terminal(sys.stdout)
        self._console = Writer(file=self._stream, soft_wrap=True, highlight=False, markup=False, emoji=False)  # type: ignore[arg-type]
        self._live = Live(
            console=self._console,
            get_renderable=self._frame,
            refresh_per_second=A_SECOND,
            transient=True,
            redirect_stderr=is_live(sys.stderr),
        )

        self._console.turn = self._live._lock  # a reentrant one, which the thread that draws holds already

    def __enter__(self) -> "LiveScreen":
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone
            self._live.stop()

    def announce(self, notice: str) -> bool:
        """In the display, at its next turn: a line of another thread would go into it."""
        self.status.notice = notice
        return False

    def _frame(self) -> Any:
        fits = "utf" in self._console.encoding
        bar, *figures = self.status.lines(min(WIDEST, self._console.width - 1), *("━╌" if fits else "#-"))
        return self._text("\n").join([self._text(bar, style="cyan"), *map(self._text, figures)])


class _Terminal:
    """A stream whose failures are nobody's: the terminal may be closed at any time."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()
