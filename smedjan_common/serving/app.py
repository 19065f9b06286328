"""The routes of the server, each with and without /v1 in front: base addresses are written both ways.

A request is checked, tokenised and queued before its answer begins, so that what is refused has its status. Texts are parsed in a thread
of their own, one at a time: a long one holds up no stream. Without a client there is no answer: a stream, and what is not streamed, ends
in the engine as soon as the connection does.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, Router

from smedjan_common.errors import SmedjanError
from smedjan_common.inference.request import Piece
from smedjan_common.inference.service import QueueFull, Service, Unavailable
from smedjan_common.serving import openai_requests, sse, tokens
from smedjan_common.serving.answers import Answer, Crossing
from smedjan_common.serving.api_error import ApiError
from smedjan_common.serving.bodies import Bodies
from smedjan_common.serving.departures import unless_gone
from smedjan_common.serving.fields import read_object
from smedjan_common.serving.guard import Json
from smedjan_common.serving.metrics import Metrics
from smedjan_common.serving.openai_replies import Replies
from smedjan_common.serving.openai_requests import Asked
from smedjan_common.serving.page import page
from smedjan_common.serving.served import Served

PING_SECONDS = 15.0
Read = Callable[[dict[str, Any], Served], Any]


class Api:
    """Answers for one model. crossing: its `flush` is the service's. queue_seconds: the longest that a request waits
    for a slot; 0: without end. `state`: "loading", "ok" or "draining", as the server says."""

    def __init__(self, served: Served, service: Service, crossing: Crossing, metrics: Metrics, bodies: Bodies, queue_seconds: float = 0.0):
        self.served, self.service, self.metrics = served, service, metrics
        self.state = "loading"
        self._crossing = crossing
        self._bodies, self._queue_seconds = bodies, queue_seconds
        self._parser = ThreadPoolExecutor(1, "parser")  # the tokenizer remembers words, for one thread at a time

    def open(self) -> None:
        """Answer in the event loop that runs here."""
        self._crossing.open()

    def router(self) -> Router:
        """The ASGI application."""
        rows = (
            ("/models", self.models, "GET"),
            ("/models/{name:path}", self.model, "GET"),
            ("/completions", self.completions, "POST"),
            ("/chat/completions", self.chat, "POST"),
            ("/tokenize", self.tokenize, "POST"),
            ("/detokenize", self.detokenize, "POST"),
            ("/tokenizer_info", self.tokenizer_info, "GET"),
            ("/health", self.health, "GET"),
            ("/metrics", self.tell_metrics, "GET"),
        )
        routes = [Route(before + path, handler, methods=[method]) for path, handler, method in rows for before in ("", "/v1")]
        return Router([Route("/", self.page, methods=["GET"]), *routes], redirect_slashes=False)

    async def page(self, request: Request) -> Response:
        status, body, headers = page().answer(request.headers.get("accept-encoding", ""), request.headers.get("if-none-match", ""))
        return Response(body, status, headers)

    async def models(self, _: Request) -> Response:
        return Json({"object": "list", "data": [self.served.describe(name) for name in self.served.names]})

    async def model(self, request: Request) -> Response:
        if (name := request.path_params["name"]) not in self.served.names:
            raise openai_requests.unknown_model(name, self.served)
        return Json(self.served.describe(name))

    async def health(self, _: Request) -> Response:
        state = self.standing()
        return Json({"status": state}, 200 if state == "ok" else 503, headers={} if state == "ok" else {"retry-after": "1"})

    async def tell_metrics(self, _: Request) -> Response:
        return PlainTextResponse(self.metrics.text(self.service.stats()), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def tokenize(self, request: Request) -> Response:
        return Json(await self._parse(request, tokens.tokenize))

    async def detokenize(self, request: Request) -> Response:
        return Json(await self._parse(request, tokens.detokenize))

    async def tokenizer_info(self, _: Request) -> Response:
        return Json(tokens.tokenizer_info(self.served))

    async def completions(self, request: Request) -> Response:
        return await self._generate(request, openai_requests.read_completion)

    async def chat(self, request: Request) -> Response:
        return await self._generate(request, openai_requests.read_chat)

    def standing(self) -> str:
        """ok, or why no request is taken: loading, draining or dead."""
        return "dead" if self.state == "ok" and not self.service.alive else self.state

    async def _parse(self, request: Request, read: Read) -> Any:
        async with self._bodies.read(request.receive, request.headers.get("content-length")) as raw:
            return await asyncio.get_running_loop().run_in_executor(self._parser, lambda: read(read_object(raw), self.served))

    async def _generate(self, request: Request, read: Callable[[dict[str, Any], Served], Asked]) -> Any:
        if (state := self.standing()) == "dead":
            raise ApiError(500, "The model's thread ended, and nothing is answered any more. The server's log says why.")
        if state != "ok":
            raise ApiError(503, f"The server takes no request: it is {state}.", retry_after=1)
        asked = await self._parse(request, read)
        answer, replies = self._submit(asked), Replies(asked, self.served)
        if asked.stream:
            return sse.EventStream(self._events(answer, replies), answer.cancel)
        try:
            return Json(await unless_gone(request.receive, self._whole(answer, replies)))
        finally:
            answer.cancel()

    def _submit(self, asked: Asked) -> Answer:
        try:
            return Answer(asked.requests, self.service, self._crossing)
        except QueueFull as error:
            raise ApiError(429, str(error), retry_after=1) from None
        except Unavailable as error:
            raise ApiError(503, str(error), retry_after=1) from None
        except SmedjanError as error:
            raise ApiError(400, str(error)) from None

    async def _whole(self, answer: Answer, replies: Replies) -> dict[str, Any]:
        async for pieces in self._pieces(answer):
            for index, piece in pieces:
                replies.add(index, piece)
        return replies.whole()

    async def _events(self, answer: Answer, replies: Replies) -> AsyncIterator[bytes]:
        """The stream; events that are ready together are sent together. An error after its begin is an event; then there is no [DONE]."""
        try:
            yield sse.events(replies.begin())
            async for pieces in self._pieces(answer):
                chunks = (chunk for index, piece in pieces for chunk in replies.chunks(index, piece))
                yield sse.events(chunks) if pieces else sse.PING
            yield sse.events(replies.end()) + sse.DONE
        except ApiError as error:
            yield sse.events([error.body()])

    async def _pieces(self, answer: Answer) -> AsyncIterator[list[tuple[int, Piece]]]:
        """Every piece, as they come; an empty list whenever there was none for a while. Raises ApiError, also for what waited too long."""
        limit = time.monotonic() + self._queue_seconds if self._queue_seconds else float("inf")
        while True:
            waiting = limit < float("inf") and answer.is_waiting()
            seconds = min(PING_SECONDS, max(limit - time.monotonic(), 0.0)) if waiting else PING_SECONDS
            try:
                found = await answer.next(seconds)
            except TimeoutError:
                if waiting and time.monotonic() >= limit and answer.is_waiting():
                    why = f"The request waited {self._queue_seconds:g} seconds for its turn, the longest that this server lets one wait."
                    raise ApiError(503, why, code="queue_timeout", retry_after=5) from None
                yield []
                continue
            if not found:
                return
            yield found
