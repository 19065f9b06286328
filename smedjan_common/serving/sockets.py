"""The sockets that a server listens on, taken before the model is loaded: a port in use is told at once."""

import contextlib
import errno
import resource
import socket
from collections.abc import Sequence

from smedjan_common.errors import SmedjanError

LOOPBACKS = ("127.0.0.1", "::1")  # "localhost" is either, and which comes first differs between machines
MOST_FILES = 8192  # connections and files that a process may have open, where the system allows


class AddressError(SmedjanError):
    """An address that cannot be listened on."""


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets bound to `host` and `port`, both loopbacks for either of them; port 0: any free one. Raises AddressError."""
    if not 0 <= port < 1 << 16:
        raise AddressError(f"--port is {port}.", "Ports are 0 (any free one) to 65535.", "Leave it out for 8080.")
    if host in ("localhost", *LOOPBACKS):
        return _loopbacks(port)
    try:
        return [_bound(host, port)]
    except _NoSuchAddress:
        raise AddressError(f"--host {host} is no address of this machine.", "", "Take 127.0.0.1, or 0.0.0.0 for all of them.") from None


def _loopbacks(port: int) -> list[socket.socket]:
    """Both at one port, or the one that there is."""
    first = _bound(LOOPBACKS[0], port)
    try:
        return [first, _bound(LOOPBACKS[1], first.getsockname()[1])]
    except _NoSuchAddress:  # a machine without IPv6
        return [first]
    except AddressError:
        first.close()
        if port:
            raise
        return _loopbacks(port)  # the free port of one is not free on the other


class _NoSuchAddress(Exception):
    pass


def _bound(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        made = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError):  # the latter: a name with a part that is empty, or too long
        raise _NoSuchAddress from None
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6 and address[0] == LOOPBACKS[1]:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    try:
        made.bind(address)
        made.listen(2048)
    except OSError as error:
        made.close()
        if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            raise _NoSuchAddress from None
        raise _refused(host, port, error) from None
    made.setblocking(False)
    return made


def _refused(host: str, port: int, error: OSError) -> AddressError:
    if error.errno == errno.EADDRINUSE:
        why = "Another program, perhaps another server of this kind, listens there."
        return AddressError(
            f"Port {port} of {host} is in use.", why, f"Stop it, or take another port: --port {port + 1 if port < 65535 else 0}."
        )
    if error.errno == errno.EACCES:
        return AddressError(f"Port {port} of {host} may not be used.", "Ports below 1024 are the system's.", "Take --port 8080.")
    return AddressError(f"Port {port} of {host} cannot be used.", f"{error.strerror or error}.", "Take another one.")


def addresses(sockets: Sequence[socket.socket]) -> list[str]:
    """http://HOST:PORT of each, as this machine reaches it."""
    found = [made.getsockname()[:2] for made in sockets]
    found = [({"0.0.0.0": LOOPBACKS[0], "::": LOOPBACKS[1]}.get(host, host), port) for host, port in found]
    return [f"http://{f'[{host}]' if ':' in host else host}:{port}" for host, port in found]


def allow_many_files() -> None:
    """Let this process have more open files than a terminal's default, 256 on macOS: every connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
