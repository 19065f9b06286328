"""The process around the routes: connections, signals, and an end that lets answers end.

The first SIGINT, SIGTERM or SIGHUP closes the door and waits for the answers that have begun; a second one ends at once. What has not
ended after `drain_seconds` is cancelled, and its client told so.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from smedjan_common.serving.app import Api
from smedjan_common.streams import put, put_now

IDLE_SECONDS = 75.0  # without a whole head of a request a connection is closed after so long, whatever drips in
HEAD_BYTES = 64 << 10
LOOK_SECONDS = 0.1
END_SECONDS = 5.0
TWICE_SECONDS = 0.3  # within so long one signal may come twice: to the process and to its group, as `timeout` sends it
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Connection(H11Protocol):
    """uvicorn's, with an end for clients that never finish the head of a request."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def on_response_complete(self) -> None:
        self._wait()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline:
            self._deadline.cancel()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._deadline:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(IDLE_SECONDS, self._look)

    def _look(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's, with signals that are ours."""

    def capture_signals(self) -> Any:
        return contextlib.nullcontext()


def serve(app: Any, api: Api, sockets: Sequence[socket.socket], ready: Callable[[], object], drain_seconds: float) -> int:
    """Load the model and answer until a signal comes; returns the exit code. ready: called once requests are taken.

    Raises what loading the model raises.
    """
    return asyncio.run(_serve(app, api, list(sockets), ready, drain_seconds))


async def _serve(app: Any, api: Api, sockets: list[socket.socket], ready: Callable[[], object], drain_seconds: float) -> int:
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",  # what strangers send is no news; what the server does is told by Guard
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=int(IDLE_SECONDS),
        h11_max_incomplete_event_size=HEAD_BYTES,
    )
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of clients that have left
    server, received = Server(config), asyncio.get_running_loop().create_future()
    _catch_signals(received)
    api.open()
    serving, starting = asyncio.create_task(server.serve(sockets)), asyncio.create_task(asyncio.to_thread(api.service.start))
    await asyncio.wait({starting, received}, return_when=asyncio.FIRST_COMPLETED)
    if received.done():
        _leave(128 + received.result())  # while the model is loaded nothing has begun, and loading cannot be ended
    try:
        starting.result()
        api.state = "ok"
        ready()
        watching = asyncio.create_task(_watch(api))
        number = await received
        watching.cancel()
        api.state = "draining"
        server.should_exit = True  # from here on nobody is let in
        await asyncio.to_thread(api.service.drain, drain_seconds)
        await asyncio.wait({serving}, timeout=END_SECONDS)  # the last answers go out
        return 128 + number
    finally:
        server.should_exit = True
        api.service.close(END_SECONDS)


def _leave(code: int) -> NoReturn:
    """End the process, whatever its threads do."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


async def _watch(api: Api) -> None:
    """Say that the model's thread died, once it did."""
    while api.service.alive:
        await asyncio.sleep(LOOK_SECONDS)
    put(f"error: {api.service.error}\n       Nothing is answered any more. Start the server again.", sys.stderr)


def _catch_signals(received: "asyncio.Future[int]") -> None:
    first = 0.0

    def caught(number: int) -> None:
        nonlocal first
        name = signal.Signals(number).name
        if received.done():
            if number != signal.SIGHUP and time.monotonic() > first + TWICE_SECONDS:
                put_now(f"{name} again: stopped at once.", sys.stderr)
                _leave(128 + number)
            return
        put_now(f"{name}: no more requests; waiting for the answers that have begun (once more: stop at once).", sys.stderr)
        received.set_result(number)
        first = time.monotonic()

    for number in SIGNALS:
        if not (number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN):  # nohup
            asyncio.get_running_loop().add_signal_handler(number, caught, number)
