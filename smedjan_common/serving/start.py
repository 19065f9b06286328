"""All parts of a server put together: the engine's thread, the routes, the checks around them, the sockets."""

import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from smedjan_common.inference.engine import Engine
from smedjan_common.inference.service import Service
from smedjan_common.serving.access import Access
from smedjan_common.serving.answers import Crossing
from smedjan_common.serving.app import Api
from smedjan_common.serving.bodies import Bodies
from smedjan_common.serving.guard import Guard
from smedjan_common.serving.metrics import Metrics
from smedjan_common.serving.served import Served
from smedjan_common.serving.server import serve
from smedjan_common.streams import put_now


@dataclass(frozen=True)
class Settings:
    """How to serve. max_queue: requests that may wait; seconds: the longest wait for a slot (0: without end), and for answers at the end.

    quiet: no line per request. info: labels of what serves.
    """

    access: Access = field(default_factory=Access)
    max_queue: int = 256
    queue_seconds: float = 60.0
    drain_seconds: float = 8.0
    quiet: bool = False
    info: Mapping[str, object] = field(default_factory=dict)
    bodies: Bodies = field(default_factory=Bodies)


def start(
    served: Served, engine: Callable[[], Engine], settings: Settings, sockets: Sequence[socket.socket], ready: Callable[[], object]
) -> int:
    """Serve until a signal comes; returns the exit code. engine: makes it, in a thread of its own. ready: called once it is there.

    Raises what `engine` raises.
    """
    crossing, metrics = Crossing(), Metrics(settings.info)
    api = Api(served, Service(engine, settings.max_queue, crossing.flush), crossing, metrics, settings.bodies, settings.queue_seconds)

    def told(method: str, path: str, status: int, seconds: float, number: str) -> None:
        metrics.told(path, status)
        if not settings.quiet:
            put_now(ascii(f"{method} {path[:200]}")[1:-1] + f" {status} {seconds:.3f} s {number}", sys.stderr)

    return serve(Guard(api.router(), settings.access, told), api, sockets, ready, settings.drain_seconds)
