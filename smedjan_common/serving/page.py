"""The page at `/`: one file that talks to this server alone, and the policy that a browser holds it to.

Its style and its script are named by their hashes, so nothing else runs, whatever text a model writes; it may ask its own server and no
other; with trusted types no text becomes HTML. The file is read once and served as it is.
"""

import base64
import functools
import gzip
import hashlib
import re
from importlib import resources
from typing import NamedTuple

_INLINE = {"style-src": "style", "script-src": "script"}


class Page(NamedTuple):
    """The file, also compressed, and the headers that it is sent with."""

    body: bytes
    gzipped: bytes
    headers: dict[str, str]

    def answer(self, accepts: str, tag: str) -> tuple[int, bytes, dict[str, str]]:
        """(status, body, headers) for a request with these Accept-Encoding and If-None-Match headers."""
        if tag == self.headers["etag"]:
            return 304, b"", self.headers
        if "gzip" in accepts:
            return 200, self.gzipped, self.headers | {"content-encoding": "gzip"}
        return 200, self.body, self.headers


@functools.cache
def page() -> Page:
    """The page."""
    body = resources.files("smedjan_common.serving").joinpath("page.html").read_bytes()
    return Page(body, gzip.compress(body, mtime=0), _headers(body))


def _headers(body: bytes) -> dict[str, str]:
    return {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": policy(body),
        "cache-control": "no-cache",
        "etag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
        "vary": "accept-encoding",
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "permissions-policy": "camera=(), microphone=(), geolocation=()",
    }


def policy(body: bytes) -> str:
    """The content security policy of a page: its own style and script, its own server, nothing else."""
    rules = {
        "default-src": "'none'",
        **{rule: " ".join(_hashes(body, tag)) for rule, tag in _INLINE.items()},
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return "; ".join(f"{rule} {value}" for rule, value in rules.items())


def _hashes(body: bytes, tag: str) -> list[str]:
    found = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), body, re.DOTALL)
    return [f"'sha256-{base64.b64encode(hashlib.sha256(part).digest()).decode()}'" for part in found]
