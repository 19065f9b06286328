"""Server-sent events: `data: JSON` lines with an empty line after each, `data: [DONE]` at the end, `: ping` so that nobody hangs up.

A line ends where any reader thinks it does, so U+2028, U+2029 and U+0085 are escaped: they are letters of JSON, and ends of lines to
some clients (Python's str.splitlines, and all that is built on it).
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from smedjan_common.serving.departures import Gone, unless_gone

SEND_SECONDS = 60.0  # a client that takes nothing for so long has left
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would hold the stream back
}
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
_ENDS_OF_LINES = {ord(letter): f"\\u{ord(letter):04x}" for letter in "\x85\u2028\u2029"}


def to_json(value: Any) -> bytes:
    """JSON in UTF-8, on one line."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.translate(_ENDS_OF_LINES).encode("utf-8", "replace")  # half a surrogate pair becomes a question mark


def events(values: Iterable[Any]) -> bytes:
    """An event for each value."""
    return b"".join(b"data: " + to_json(value) + b"\n\n" for value in values)


class EventStream:
    """An ASGI response: events for as long as its client listens. close: called at the end, whoever ended it."""

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]):
        self._events, self._close = events, close

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await unless_gone(receive, self._send(send))
        finally:
            self._close()

    async def _send(self, send: Any) -> None:
        headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for each in self._events:
            if not each:  # nothing of it is to be told
                continue
            try:
                async with asyncio.timeout(SEND_SECONDS):
                    await send({"type": "http.response.body", "body": each, "more_body": True})
                    await asyncio.sleep(0)  # others have their turn, and that the client has left is noticed
            except TimeoutError:
                raise Gone from None
        await send({"type": "http.response.body", "body": b"", "more_body": False})
