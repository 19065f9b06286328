"""Addresses: what has a scheme, s3://bucket/text.jsonl or https://host/text.txt, is read and written through fsspec; the rest is a path.

An address may hold a secret, a password or the signature of a link that lets its holder in; `shown` is what people and files get to see.
"""

import os
import posixpath
import re
from dataclasses import dataclass
from urllib.parse import unquote

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://", re.ASCII)
_USER = re.compile(r"(?<=://)[^/?#]*@")
HTTP = ("http", "https")


def is_remote(name: object) -> bool:
    """Whether it is an address and no path."""
    return isinstance(name, Address) or (isinstance(name, str) and _SCHEME.match(name) is not None)


def scheme_of(url: str) -> str:
    """`s3` of s3://bucket/key."""
    match = _SCHEME.match(url)
    assert match, "an address"
    return match[1].lower()


def shown(url: str) -> str:
    """The address without what may be secret: user and password before the host, and all after a question mark of a web address."""
    url = _USER.sub("", url)
    return re.split("[?#]", url, maxsplit=1)[0] if scheme_of(url) in HTTP else url


@dataclass(frozen=True)
class Address(os.PathLike):
    """An address where others have a Path: `str` shows it, `os.fspath` gives all of it."""

    url: str

    def __str__(self) -> str:
        return shown(self.url)

    def __repr__(self) -> str:
        return f"Address({shown(self.url)!r})"

    def __fspath__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "Address":
        base, mark, query = self.url.partition("?") if scheme_of(self.url) in HTTP else (self.url, "", "")
        return Address(f"{base.rstrip('/')}/{name}{mark}{query}")

    @property
    def parent(self) -> "Address":
        """The folder of it, without what a web address has after a question mark."""
        base = self.url.partition("?")[0] if scheme_of(self.url) in HTTP else self.url
        return Address(base.rstrip("/").rpartition("/")[0])

    @property
    def name(self) -> str:
        """The last part, as a file's name."""
        return unquote(posixpath.basename(shown(self.url).rstrip("/"))) if scheme_of(self.url) in HTTP else posixpath.basename(self.url)

    @property
    def suffixes(self) -> list[str]:
        """`.jsonl`, `.gz` of text.jsonl.gz."""
        return [f".{part}" for part in self.name.lstrip(".").split(".")[1:]]

    @property
    def suffix(self) -> str:
        """The last of them, or nothing."""
        return self.suffixes[-1] if self.suffixes else ""
