"""Who may ask: the Host that a request names, the page that it comes from, its key.

A page of another site can make a browser send requests to this machine. Where the server listens on the loopback alone, the Host must be
a loopback name, or one that was allowed: a name that an attacker points here (DNS rebinding) is neither. Elsewhere an address is taken too,
which no such name can be. A request that says which page sent it (Origin) must come from this server's own or from an allowed one.
"""

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from smedjan_common.serving.api_error import ApiError

OPEN = ("/", "/health", "/v1/health")  # answered without a key: a browser cannot send one for a page, nor can most health checks
EXPOSED = "x-request-id, retry-after"
METHODS = "GET, POST, OPTIONS"


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own alone."""
    address = _address(host)
    return host == "localhost" if address is None else address.is_loopback


def host_name(host: str) -> str:
    """The name in a Host header, without port and brackets, in small letters."""
    name = host.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.rpartition(":")[0] if name.count(":") == 1 else name


@dataclass(frozen=True)
class Access:
    """key: what requests must bring; empty: none. hosts, origins: also allowed; * is any. loopback: nobody else can reach the server."""

    key: str = ""
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    loopback: bool = True

    def check(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        """Raises ApiError for a request that must not be answered. headers: names in small letters."""
        self._check_host(headers.get("host", ""))
        origin = headers.get("origin")
        if origin is not None and not self._is_own(origin, headers["host"]) and not self._is_allowed(origin):
            why = f"Pages of {origin[:100]!r} may not ask this server. Start it with --cors-origin {origin[:100]} to allow them."
            raise ApiError(403, why, code="origin_not_allowed")
        if method != "OPTIONS" and path not in OPEN and not self._has_key(headers.get("authorization", "")):
            raise ApiError(401, "The API key is missing or wrong. Send it as `Authorization: Bearer KEY`.")

    def cors(self, method: str, headers: Mapping[str, str]) -> dict[str, str]:
        """What tells a browser that a page of another origin may read the answer."""
        origin = headers.get("origin")
        if origin is None or not self._is_allowed(origin):
            return {}
        told = {"access-control-allow-origin": origin, "access-control-expose-headers": EXPOSED, "vary": "origin"}
        if method == "OPTIONS":
            asked = headers.get("access-control-request-headers", "")
            told |= {"access-control-allow-methods": METHODS, "access-control-allow-headers": asked, "access-control-max-age": "600"}
            if headers.get("access-control-request-private-network") == "true":
                told["access-control-allow-private-network"] = "true"
        return told

    def _check_host(self, host: str) -> None:
        name = host_name(host)
        known = is_loopback(name) or name in self.hosts or (not self.loopback and _address(name) is not None)
        if not name or not (known or "*" in self.hosts):
            why = (
                f"This server does not answer to the host {name[:100]!r}. Start it with --allowed-host {name[:100] or 'NAME'} if it should."
            )
            raise ApiError(403, why, code="host_not_allowed")

    def _is_own(self, origin: str, host: str) -> bool:
        try:
            return urlsplit(origin).netloc.lower() == host.strip().lower()
        except ValueError:
            return False

    def _is_allowed(self, origin: str) -> bool:
        return origin in self.origins or "*" in self.origins

    def _has_key(self, authorization: str) -> bool:
        scheme, _, given = authorization.partition(" ")
        same = hmac.compare_digest(_digest(given.strip()), _digest(self.key))  # of digests: the time tells not even the length
        return not self.key or (scheme.lower() == "bearer" and same)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
