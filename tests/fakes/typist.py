"""A program with a controlling terminal of its own, driven as a person drives it: waiting for what it shows, typing, pressing Ctrl-C."""

import contextlib
import os
import pty
import select
import signal
import sys
import termios
import time

from tests.fakes.runs import ROOT

CTRL_C, CTRL_D, ENTER = "\x03", "\x04", "\r"


class Typist:
    """`shown`: everything so far. A context: the program is ended when it is left."""

    def __init__(self, module: str, *words: object, **environment: str):
        self.shown, self.code = "", None
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.environ.update(environment)
            os.execv(sys.executable, [sys.executable, "-m", module, *map(str, words)])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._fd)

    def type(self, text: str, enter: str = ENTER) -> None:
        """After a moment: a prompt is shown just before readline listens, and a key pressed between is the terminal's, not readline's."""
        time.sleep(0.15)
        os.write(self._fd, (text + enter).encode())

    def wait(self, text: str, seconds: float = 60) -> str:
        """Until `text` is shown after what was waited for before; what was shown up to it."""
        begin, end = getattr(self, "_seen", 0), time.monotonic() + seconds
        while (at := self.shown.find(text, begin)) < 0:
            assert time.monotonic() < end, f"{text!r} was not shown: {self.shown[begin:]!r}"
            assert self._read(), f"the program ended: {self.shown[begin:]!r}"
        self._seen = at + len(text)
        return self.shown[begin : self._seen]

    @property
    def echoes(self) -> bool:
        """Whether the terminal itself shows what is typed, as it does when no program edits lines."""
        return bool(termios.tcgetattr(self._fd)[3] & termios.ECHO)

    def end(self, seconds: float = 30) -> int:
        """Wait for the program to end by itself; its exit code."""
        end = time.monotonic() + seconds
        while self._read():
            assert time.monotonic() < end, f"the program goes on: {self.shown[-300:]!r}"
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code

    def _read(self) -> bool:
        if not select.select([self._fd], [], [], 0.1)[0]:
            return True
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # Linux says so when the other side is closed
            return False
        self.shown += data.decode("utf-8", "replace")
        return bool(data)
