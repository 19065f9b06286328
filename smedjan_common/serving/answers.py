"""From the device thread to the event loop: the pieces of all requests cross together, and an answer is read where it is awaited.

The thread never waits for a client, and wakes the loop once an iteration. What a slow client has not read yet is bounded by the tokens
that it asked for.
"""

import asyncio
import contextlib
import functools
import threading
from collections import deque
from collections.abc import Sequence

from smedjan_common.inference.request import Piece, Request
from smedjan_common.inference.service import Service
from smedjan_common.serving.api_error import ApiError


class Crossing:
    """Hands what the device thread `put`s to answers of the event loop, at each `flush`."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = threading.Lock()
        self._waiting: list[tuple[Answer, int, list[Piece]]] = []

    def open(self) -> None:
        """The loop that runs here is the one to hand over to."""
        self._loop = asyncio.get_running_loop()

    def put(self, answer: "Answer", index: int, pieces: list[Piece]) -> None:
        """Pieces of request `index` of an answer."""
        with self._lock:
            self._waiting.append((answer, index, pieces))

    def flush(self) -> None:
        """Hand over what waits, without waiting."""
        if self._waiting and self._loop:
            with contextlib.suppress(RuntimeError):  # the loop ended, and nobody listens
                self._loop.call_soon_threadsafe(self._hand_over)

    def _hand_over(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for answer, index, pieces in waiting:
            answer.take(index, pieces)


class Answer:
    """The answers to one HTTP request, piece by piece. `cancel` ends what is left of it; do it always, when done."""

    def __init__(self, requests: Sequence[Request], service: Service, crossing: Crossing):
        """Raises what `service.submit_all` raises; then none of the requests was taken."""
        self._new = asyncio.Event()
        self._pieces: deque[tuple[int, Piece]] = deque()
        self._open = len(requests)
        self._handles = service.submit_all(
            [(request, functools.partial(crossing.put, self, index)) for index, request in enumerate(requests)]
        )

    def take(self, index: int, pieces: list[Piece]) -> None:
        """Pieces of request `index`, in the event loop."""
        self._pieces.extend((index, piece) for piece in pieces)
        self._new.set()

    async def next(self, seconds: float | None = None) -> list[tuple[int, Piece]]:
        """(number of the request, piece) of all that have come, at least one; none once all requests have ended.

        Raises TimeoutError after `seconds` without one, ApiError for one that went wrong.
        """
        if not self._pieces and self._open:
            self._new.clear()
            async with asyncio.timeout(seconds):
                await self._new.wait()
        if self._pieces and (error := _error(self._pieces[0][1])):
            raise error
        found = []
        while self._pieces and not _error(self._pieces[0][1]):
            found.append(self._pieces.popleft())
            self._open -= found[-1][1].finish_reason is not None
        return found

    def is_waiting(self) -> bool:
        """Whether none of the requests has a slot yet."""
        return all(handle.waiting for handle in self._handles)

    def cancel(self) -> None:
        """Nobody listens any more."""
        for handle in self._handles:
            handle.cancel()


def _error(piece: Piece) -> ApiError | None:
    """What a piece that ends a request badly says."""
    if piece.finish_reason == "error":
        return ApiError(500, piece.error or "The request failed.")
    if piece.finish_reason == "cancelled":
        return ApiError(503, "The server stopped before the answer was whole.", retry_after=1)
    return None
