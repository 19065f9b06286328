"""A command on a terminal of its own (a pty), and what that terminal shows of it: a screen without colours, enough for rich."""

import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
_CODE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])")


class Terminal:
    """The command `python -m module …` with a pty as its standard streams. `raw` is all that it wrote."""

    def __init__(self, module: str, *words: object, columns: int = 80, rows: int = 24, **environment: str):
        self.master, self.slave = os.openpty()
        self.resize(columns, rows)
        self.before = termios.tcgetattr(self.slave)
        clean = {name: value for name, value in os.environ.items() if name not in ("CI", "NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, words)],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            cwd=ROOT,
            env=clean | {"TERM": "xterm-256color"} | environment,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            start_new_session=True,
        )
        self.raw = ""

    def resize(self, columns: int, rows: int = 24) -> None:
        """Give it another size."""
        self.columns = columns
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read(self, until: str = "", seconds: float = 60) -> str:
        """Read until a text is there, or to the end of the command; returns `raw`."""
        deadline, begin = time.monotonic() + seconds, len(self.raw)
        while not (until and until in self.raw[begin:]):
            assert time.monotonic() < deadline, self.raw[-2000:]
            if select.select([self.master], [], [], 0.05)[0]:
                self.raw += os.read(self.master, 65536).decode(errors="replace")
            elif self.process.poll() is not None:
                break
        return self.raw

    def end(self, seconds: float = 60) -> int:
        """Read to the end; returns the exit code."""
        self.read(seconds=seconds)
        return self.process.wait(10)

    def is_sane(self) -> bool:
        """Whether lines, echo and signals work as before, and the cursor was never hidden."""
        return termios.tcgetattr(self.slave) == self.before and "\x1b[?25l" not in self.raw

    def shown(self) -> list[str]:
        """The lines that are on it, those that scrolled away too."""
        lines, row, column = [""], 0, 0
        text = self.raw
        while text:
            if code := _CODE.match(text):
                number, text = int(re.sub(r"\D", "", code[1]) or 1), text[code.end() :]
                if code[2] == "A":
                    row = max(0, row - number)
                elif code[2] == "K":
                    lines[row] = "" if code[1] == "2" else lines[row][:column]
                continue
            letter, text = text[0], text[1:]
            if letter == "\n":
                row += 1
                lines += [""] * (row >= len(lines))
            elif letter == "\r":
                column = 0
            else:
                lines[row] = lines[row][:column].ljust(column) + letter + lines[row][column + 1 :]
                column += 1
        return [line.rstrip() for line in lines]
