"""The line between the processes of a run: who is there, who is gone, and a few words to all. No array goes over it.

A star of TCP connections with host 0 in the middle, one JSON object a line. It says at once when a process has ended, since the kernel
closes what a dead process had open, and after SILENT_SECONDS when a machine or the network between is gone. The frameworks' own channels
do neither: a collective waits for a dead process for minutes, or for ever.

    {"hello": [index, count, version]}          the first words of a host, answered by {"welcome": count} or {"refused": [what, why, fix]}
    {"put": [key, value]}  {"all": [key, values]}   `gather`: each host's value to host 0, all of them to each
    {"lost": [index, why, ended]}  {"bye": why}  {}    a host is gone; this one goes, by an error where `why` says so; still here
"""

import contextlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import smedjan_common
from smedjan_common.errors import ConfigError, HostError, SmedjanError

PATIENCE_SECONDS = 300.0  # for the others to start
BEAT_SECONDS = 5.0
SILENT_SECONDS = 60.0  # a host that says nothing for so long is gone
_LONGEST = 16 << 20  # bytes of a message
_VERSION = smedjan_common.__version__
_AGAIN = "Start all hosts again with the same command: the run goes on from its newest checkpoint."
_NOT_OURS = "Something else listens there, or a run of another version."


class Line:
    """This process's end of the line. `gone`: why the run cannot go on, once a host is lost.

    lost: called once, in another thread, when that is known.
    """

    def __init__(self, index: int, count: int):
        self.index, self.count = index, count
        self.gone: HostError | None = None
        self.lost: Callable[[HostError], None] = lambda error: None
        self._peers: dict[int, socket.socket] = {}
        self._sending = threading.Lock()
        self._changed = threading.Condition()
        self._numbers: Counter[str] = Counter()
        self._parts: dict[str, dict[int, Any]] = {}
        self._answers: dict[str, list[Any]] = {}
        self._closed, self._left = False, False

    def gather(self, what: str, value: Any = None) -> list[Any]:
        """What every host gave for the same `what`, by index: waits for all of them. Raises HostError when one is lost."""
        with self._changed:
            key = f"{what} {self._numbers[what]}"
            self._numbers[what] += 1
        if self.index == 0:
            self._put(0, key, value)
        else:
            self._send(0, {"put": [key, value]})
        with self._changed:
            self._changed.wait_for(lambda: key in self._answers or self.gone or self._left)
            if key not in self._answers:
                raise self.gone or HostError("Another host has ended the run already.", "This one had more to do.", _AGAIN)
            return self._answers.pop(key)

    def close(self, why: str = "") -> None:
        """Go, so that the others know: orderly, or by an error that `why` tells."""
        if self._closed:
            return
        self._closed = True
        for peer in list(self._peers):
            self._send(peer, {"bye": why})
        for connection in self._peers.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)

    def address(self) -> str:
        """The numeric address of this end."""
        found = next(iter(self._peers.values())).getsockname()[0]
        return found.removeprefix("::ffff:")  # IPv4, at a socket for both

    def begin(self, connections: dict[int, socket.socket]) -> None:
        """Listen to these peers from here on."""
        self._peers = connections
        for peer, connection in connections.items():
            connection.settimeout(SILENT_SECONDS)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._listen, args=(peer,), name=f"host {peer}", daemon=True).start()
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def _listen(self, peer: int) -> None:
        why, ended = "Its connection closed: the process was killed, or its machine.", False
        try:
            for message in _messages(self._peers[peer]):
                if "put" in message:
                    self._put(peer, *message["put"])
                elif "all" in message:
                    self._answer(*message["all"])
                elif "lost" in message:
                    self._lose(*message["lost"])
                elif "bye" in message:
                    why, ended = message["bye"], True
                    if not why:
                        self._leave()
                        return
        except TimeoutError:
            why = f"It has said nothing for {SILENT_SECONDS:.0f} seconds."
        except (OSError, ValueError):
            pass
        if not self._closed:
            self._lose(peer, why, ended)

    def _leave(self) -> None:
        with self._changed:
            self._left = True
            self._changed.notify_all()

    def _beat(self) -> None:
        while not self._closed and not self.gone:
            time.sleep(BEAT_SECONDS)
            for peer in list(self._peers):
                self._send(peer, {})

    def _put(self, index: int, key: str, value: Any) -> None:
        """Host 0 has a part of an answer, perhaps the last."""
        with self._changed:
            parts = self._parts.setdefault(key, {})
            parts[index] = value
            if len(parts) < self.count:
                return
            values = [self._parts[key][each] for each in range(self.count)]
            del self._parts[key]
        for peer in self._peers:
            self._send(peer, {"all": [key, values]})
        self._answer(key, values)

    def _answer(self, key: str, values: list[Any]) -> None:
        with self._changed:
            self._answers[key] = values
            self._changed.notify_all()

    def _lose(self, index: int, why: str, ended: bool) -> None:
        with self._changed:
            if self.gone:
                return
            what = f"Host {index} has ended the run." if ended else f"Host {index} of the run is lost."
            self.gone = HostError(what, why, "" if ended else _AGAIN)
            self._changed.notify_all()
        if self.index == 0:
            for peer in self._peers:
                self._send(peer, {"lost": [index, why, ended]})
        self.lost(self.gone)

    def _send(self, peer: int, message: dict[str, Any]) -> None:
        """To a peer; that it is gone is for who listens to it to say."""
        with self._sending, contextlib.suppress(OSError):
            self._peers[peer].sendall(_bytes(message))


def listen(port: int) -> socket.socket:
    """A socket for `serve` on this port of every interface; 0: any. Raises ConfigError where it is taken."""
    dual = socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if dual else socket.AF_INET
        return socket.create_server(("", port), family=family, dualstack_ipv6=dual)
    except OSError as error:
        fix = "Give another port to all hosts, or end the process that holds it."
        raise ConfigError(f"Host 0 cannot listen on port {port}.", f"{error.strerror or error}.", fix) from None


def serve(server: socket.socket, count: int, patience: float = PATIENCE_SECONDS) -> Line:
    """Host 0 of `count`: waits for the others. Raises HostError when they do not come. Who does not belong is refused."""
    line, peers, end = Line(0, count), {}, time.monotonic() + patience
    with server:
        while len(peers) < count - 1:
            server.settimeout(max(0.01, end - time.monotonic()))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                missing = ", ".join(str(index) for index in range(1, count) if index not in peers)
                what = f"Host{'s' * (',' in missing)} {missing} did not come within {patience:.0f} seconds."
                raise HostError(
                    what, f"The run has {count} hosts.", "Start every host with the same command, each with its own --host-id."
                ) from None
            index = _welcomed(connection, count, peers)
            if index is None:
                connection.close()
            else:
                peers[index] = connection
    line.begin(peers)
    return line


def join(address: str, index: int, count: int, patience: float = PATIENCE_SECONDS) -> Line:
    """Host `index` of `count` meets host 0 at `HOST:PORT`. Raises ConfigError where that one refuses it, HostError where none is."""
    end, error = time.monotonic() + patience, None
    where = split_address(address)
    while time.monotonic() < end:
        try:
            connection = socket.create_connection(where, timeout=min(10.0, patience))
        except OSError as last:
            error = last
            time.sleep(0.2)
            continue
        line = Line(index, count)
        line.begin({0: _introduced(connection, address, index, count, end)})
        return line
    why = f"{(error.strerror or error) if error else 'No answer'}; it was tried for {patience:.0f} seconds."
    raise HostError(f"Host 0 was not found at {address}.", why, "Start it with the same command and --host-id 0, and check the address.")


def split_address(address: str) -> tuple[str, int]:
    """HOST:PORT -> both. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        what = f"--coordinator {address} is no address."
        raise ConfigError(what, "It is the name or number of host 0 and a free port there.", "Write --coordinator node1:6000, say.")
    return host.strip("[]"), int(port)


def _welcomed(connection: socket.socket, count: int, peers: dict[int, socket.socket]) -> int | None:
    """The index of who has just come, or None for one that was refused."""
    connection.settimeout(10)
    try:
        index, hosts, version = next(_messages(connection))["hello"]
    except (OSError, ValueError, LookupError, TypeError, StopIteration):
        return None
    refusal = _refusal(index, hosts, version, count, peers)
    with contextlib.suppress(OSError):
        connection.sendall(_bytes({"refused": refusal} if refusal else {"welcome": count}))
    return None if refusal else index


def _refusal(index: Any, hosts: Any, version: Any, count: int, peers: dict[int, socket.socket]) -> tuple[str, str, str] | None:
    if version != _VERSION:
        return (
            f"Host {index} has smedjan {version}, host 0 {_VERSION}.",
            "They would not train the same.",
            "Install one version everywhere.",
        )
    if hosts != count:
        return f"This host was told --num-hosts {hosts}, host 0 {count}.", "A run has one number of hosts.", "Give the same to all."
    if type(index) is not int or not 0 < index < count:
        return f"--host-id {index} is taken.", "Host 0 is the one that listens.", f"Give each host its own, from 0 to {count - 1}."
    if index in peers:
        return f"--host-id {index} is taken.", "Another process came with it before.", f"Give each host its own, from 0 to {count - 1}."
    return None


def _introduced(connection: socket.socket, address: str, index: int, count: int, end: float) -> socket.socket:
    """The connection, when host 0 has taken this host in; it may first wait for others."""
    connection.settimeout(max(1.0, end - time.monotonic()))
    try:
        connection.sendall(_bytes({"hello": [index, count, _VERSION]}))
        answer = next(_messages(connection))
    except (OSError, ValueError, StopIteration):
        raise ConfigError(f"What listens at {address} is not host 0 of this run.", _NOT_OURS, "Check the address and the port.") from None
    if "refused" in answer:
        raise ConfigError(*answer["refused"])
    return connection


def _messages(connection: socket.socket):
    """The messages of a peer until it closes. Raises OSError, ValueError for what is no message."""
    rest = b""
    while True:
        head, newline, tail = rest.partition(b"\n")
        if newline:
            rest = tail
            message = json.loads(head)
            if not isinstance(message, dict):
                raise ValueError("no message")
            yield message
            continue
        part = connection.recv(1 << 16)
        if not part:
            return
        rest += part
        if len(rest) > _LONGEST:
            raise ValueError("too long for a message")


def _bytes(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def told(error: BaseException) -> str:
    """What an error that ends this host is to the others."""
    return error.what if isinstance(error, SmedjanError) else f"It ended by {type(error).__name__}."
