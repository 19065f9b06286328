"""An object of a store as a file: read from front to end with the next parts on their way, or at any place.

A part that is cut short is asked for again. At the end of the object its size and mark are compared with those of the beginning, so
that no text is ever made of two versions. Of a server that does not say the size, nothing but its stream is there.
"""

import io
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from smedjan_common.errors import DataError
from smedjan_common.remote.address import Address
from smedjan_common.remote.store import Place, harmless

PART = 8 << 20
_AHEAD = 3  # parts under way
_BUFFER = 1 << 17


def open_remote(address: Address) -> io.BufferedReader:
    """The bytes of an object. Raises ConfigError, DataError."""
    place = Place(address)
    stat = place.stat()
    raw = _Stream(place) if stat.size is None else RemoteFile(place, stat.size, stat.mark)
    return io.BufferedReader(raw, _BUFFER)


class RemoteFile(io.RawIOBase):
    """An object of known size; seekable, and fastest from front to end."""

    def __init__(self, place: Place, size: int, mark: str):
        self._place, self._size, self._mark = place, size, mark
        self._at, self._part, self._start = 0, b"", 0  # the part that is here, and where it begins
        self._asked: deque[tuple[int, Future[bytes]]] = deque()
        self._threads: ThreadPoolExecutor | None = None
        self._checked = False

    @property
    def name(self) -> str:
        """The address."""
        return str(self._place)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        if self._at >= self._size:
            self._check()
            return 0
        inside = self._at - self._start
        if not 0 <= inside < len(self._part):
            self._fetch()
            inside = self._at - self._start
        size = min(len(buffer), len(self._part) - inside)
        buffer[:size] = self._part[inside : inside + size]
        self._at += size
        return size

    def _fetch(self) -> None:
        """Bring the part at the position, and ask for those after it."""
        while self._asked and self._asked[0][0] != self._at:
            self._asked.popleft()[1].cancel()
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_AHEAD, "remote")
        first = self._asked[-1][0] + PART if self._asked else self._at
        for start in range(first, min(self._size, self._at + _AHEAD * PART), PART):
            self._asked.append((start, self._threads.submit(self._place.read, start, min(start + PART, self._size))))
        self._start, asked = self._asked.popleft()
        self._part = asked.result()

    def _check(self) -> None:
        """At the end: whether it is still what it was."""
        if self._checked:
            return
        now = self._place.stat()
        if (now.size, now.mark) != (self._size, self._mark):
            raise DataError(f"{self._place} was changed while it was read.", "Its end is not of the same text.", "Give the command again.")
        self._checked = True

    def close(self) -> None:
        if self._threads:
            self._threads.shutdown(wait=False, cancel_futures=True)
        super().close()


class _Stream(io.RawIOBase):
    """An object whose size is not known."""

    def __init__(self, place: Place):
        self._place, self._file = place, place.stream()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read(len(buffer))
        except Exception as error:  # as in store.py
            why = f"The stream ended before its end: {harmless(str(error)) or type(error).__name__}."
            raise DataError(f"Cannot read {self._place}.", why, "Give the same command again.") from None
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
