"""Reading the bodies of requests: not too long each, not too many at once, not too slow."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from smedjan_common.serving.api_error import ApiError
from smedjan_common.serving.departures import Gone, Receive


class Bodies:
    """most: bytes of one body; together: of all that are read or understood at a time; seconds: for one to arrive."""

    def __init__(self, most: int = 8 << 20, together: int = 128 << 20, seconds: float = 30.0):
        self.most, self.together, self.seconds = most, together, seconds
        self.held = 0

    @contextlib.asynccontextmanager
    async def read(self, receive: Receive, length: str | None) -> AsyncIterator[bytes]:
        """The whole body, which counts as held within the context. length: what the header of that name says.

        Raises ApiError; Gone where the client left.
        """
        if length is not None and length.isdigit() and int(length[:20]) > self.most:
            raise self._too_long()
        held = [0]
        try:
            yield await self._in_time(receive, held)
        finally:
            self.held -= held[0]

    async def _in_time(self, receive: Receive, held: list[int]) -> bytes:
        try:
            async with asyncio.timeout(self.seconds):
                return await self._read(receive, held)
        except TimeoutError:
            raise ApiError(408, f"The body did not arrive within {self.seconds:g} seconds.") from None

    async def _read(self, receive: Receive, held: list[int]) -> bytes:
        parts: list[bytes] = []
        while True:
            message: Any = await receive()
            if message["type"] == "http.disconnect":
                raise Gone
            part = message.get("body", b"")
            held[0] += len(part)
            self.held += len(part)
            if held[0] > self.most:
                raise self._too_long()
            if self.held > self.together:
                raise ApiError(429, "Too many long requests arrive at once.", retry_after=1)
            parts.append(part)
            if not message.get("more_body"):
                return b"".join(parts)

    def _too_long(self) -> ApiError:
        return ApiError(413, f"The body is longer than the {self.most} bytes that this server takes.")
