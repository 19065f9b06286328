"""The outermost layer of the server: who may ask, one id and one line of log per request, and an answer for whatever goes wrong.

Pure ASGI: a layer that buffered answers would hold streams back and hide that a client has left.
"""

import asyncio
import secrets
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from smedjan_common.serving.access import Access
from smedjan_common.serving.api_error import STATUSES, ApiError
from smedjan_common.serving.departures import Gone
from smedjan_common.serving.sse import to_json

App = Callable[[Any, Any, Any], Awaitable[None]]
LEFT = 499  # in the log: the client left before it had an answer


class Json(JSONResponse):
    """JSON that keeps letters as they are."""

    def render(self, content: Any) -> bytes:
        return to_json(content)


def error_response(error: ApiError) -> Response:
    """The answer that is an error."""
    return Json(error.body(), error.status, headers=error.headers())


class Guard:
    """`app` behind its checks. told(method, path, status, seconds, request id) is called at the end of each request."""

    def __init__(self, app: App, access: Access, told: Callable[[str, str, int, float, str], None]):
        self._app, self._access, self._told = app, access, told

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in reversed(scope["headers"])}
        number, begun, status = f"req_{secrets.token_hex(12)}", time.monotonic(), [0]
        method, path = scope["method"], scope["path"]
        more = {"x-request-id": number, **self._access.cors(method, headers)}

        async def send_more(message: Any) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
                message["headers"] = [*message["headers"], *((name.encode(), value.encode("latin-1")) for name, value in more.items())]
            await send(message)

        try:
            if error := await self._run(scope, receive, send_more, headers):
                await error_response(error)(scope, receive, send_more)
        except Gone:
            status[0] = status[0] or LEFT
        finally:
            self._told(method, path, status[0], time.monotonic() - begun, number)

    async def _run(self, scope: Any, receive: Any, send: Any, headers: dict[str, str]) -> ApiError | None:
        """Answer, or return the error to answer with. What goes wrong after an answer began is raised."""
        started = False

        async def note(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            self._access.check(scope["method"], scope["path"], headers)
            if scope["method"] == "OPTIONS":
                await Response(status_code=204)(scope, receive, note)
            else:
                await self._app(scope | {"app": self}, receive, note)
            return None
        except Gone:
            raise
        except ApiError as error:
            found = error
        except HTTPException as error:
            status = error.status_code if error.status_code in STATUSES else 400
            found = ApiError(status, f"{scope['method']} {scope['path'][:200]}: {error.detail}.")
        except asyncio.CancelledError:
            found = ApiError(503, "The server is shutting down.", retry_after=1)
        except Exception as error:
            traceback.print_exception(error, file=sys.stderr)
            found = ApiError(500, "The server made a mistake. Its log says more.")
        if started:
            raise Gone  # half an answer cannot become an error any more; the connection ends
        return found
