"""One address in a store, through fsspec: sizes, lists, ranges of bytes, writes, each tried again while that may help.

The credentials are those of the store's own library: its environment variables, its files, the machine's role. Errors never quote what
such a library says whole: it may hold an address with a signature.
"""

import contextlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from smedjan_common.errors import ConfigError, DataError
from smedjan_common.remote.address import HTTP, Address, scheme_of, shown

TRIES = 6
_FIRST_WAIT, _LONGEST_WAIT = 0.25, 8.0  # seconds
_WHOLE = 16 << 20  # bytes; a larger file is written in parts
_PART = 32 << 20
_TIMEOUT = "SMEDJAN_REMOTE_TIMEOUT"
_PACKAGES = {  # scheme -> the package that fsspec needs for it
    **dict.fromkeys(("s3", "s3a"), "s3fs"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("abfs", "abfss", "az", "adl"), "adlfs"),
    **dict.fromkeys(HTTP, "aiohttp"),
    "hf": "huggingface_hub",
    "sftp": "paramiko",
    "oci": "ocifs",
}
_SECRETS = re.compile(r"(?<=://)[^\s/@]*@|\?\S*|(?i:key|token|secret|password|credential)\w*['\"]?\s*[=:]\s*\S+")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Stat:
    """`size` in bytes, None where the server does not say. `mark`: what changes with the content (ETag, generation, time); may be empty."""

    size: int | None
    mark: str = ""


class Abandoned(Exception):
    """An upload that was asked to stop."""


class Place:
    """An object or a folder of a store. All methods raise DataError, `case` "absent" where there is nothing."""

    def __init__(self, address: Address | str):
        self.address = address if isinstance(address, Address) else Address(address)
        self._fs, self._path = _opened(self.address.url)

    def __truediv__(self, name: str) -> "Place":
        return Place(self.address / name)

    def __str__(self) -> str:
        return str(self.address)

    def stat(self) -> Stat:
        """Of an object."""
        info = self._tried(lambda: self._fs.info(self._path), "read")
        if info.get("type") == "directory":
            raise DataError(f"{self} is a folder.", "A file is wanted here.", "Name a file in it.", case="absent")
        return _stat(info)

    def stat_if_there(self) -> Stat | None:
        """The same; None where there is none, or a folder."""
        try:
            return self.stat()
        except DataError as error:
            if error.case != "absent":
                raise
            return None

    def files(self) -> dict[str, Stat]:
        """All objects below the folder, by their names from it on; none where it is not there."""
        found = self._tried(lambda: self._fs.find(self._path, detail=True), "list")
        start = self._path.rstrip("/") + "/"
        below = {name[len(start) :]: info for name, info in found.items() if name.startswith(start)}
        return {name: _stat(info) for name, info in sorted(below.items()) if name and not name.endswith("/")}

    def matches(self) -> list[Address]:
        """The objects that an address with wildcards names."""
        found = self._tried(lambda: self._fs.glob(self._path, detail=True), "list")
        return [Address(self._fs.unstrip_protocol(name)) for name, info in sorted(found.items()) if info.get("type") != "directory"]

    def read(self, start: int, end: int) -> bytes:
        """Bytes `start` to `end` of an object, all of them."""

        def part() -> bytes:
            data = self._fs.cat_file(self._path, start=start, end=end)
            if len(data) > end - start:  # a server that knows no ranges sends everything
                data = data[start:end]
            if len(data) != end - start:
                raise ConnectionError(f"{end - start} bytes were asked for, {len(data)} came")
            return data

        return self._tried(part, "read") if end > start else b""

    def read_all(self) -> bytes:
        """A small object."""
        size = self.stat().size
        return self._tried(lambda: self._fs.cat_file(self._path), "read") if size is None else self.read(0, size)

    def stream(self) -> Any:
        """An object from front to end, of a server that does not say its size; nothing is tried again then."""
        return self._tried(lambda: self._fs.open(self._path, "rb", block_size=0), "read")

    def write(self, data: bytes) -> None:
        """Write a small object at once; it is there whole or not at all."""
        self._tried(lambda: self._fs.pipe_file(self._path, data), "write")

    def send(self, file: Path, go_on: Callable[[], bool] = lambda: True) -> None:
        """Write a file as an object, and see that it has its size there. Raises Abandoned when `go_on` says no, OSError of the file."""
        size = file.stat().st_size
        if size <= _WHOLE:
            self.write(file.read_bytes())
        else:
            self._tried(lambda: self._send_parts(file, go_on), "write")
        if (there := self.stat().size) not in (size, None):
            raise self._error(ConnectionError(f"it has {there} bytes instead of {size}"), "write")

    def _send_parts(self, file: Path, go_on: Callable[[], bool]) -> None:
        out = self._fs.open(self._path, "wb", block_size=_PART)
        try:
            with open(file, "rb") as source:
                while data := source.read(_PART):
                    if not go_on():
                        raise Abandoned
                    self._write_part(out, data)
            out.close()
        except BaseException:
            _discard(out)  # closing it would make a whole object of the parts that came so far
            raise

    def _write_part(self, out: Any, data: bytes) -> None:
        try:
            out.write(data)
        except Exception as error:
            if _is_final(error) or not hasattr(out, "parts"):
                raise
            self._tried(out.flush, "write")  # S3: the part that failed is sent again, not the file

    def remove(self) -> None:
        """Remove an object, if it is there."""
        try:
            self._tried(lambda: self._fs.rm_file(self._path), "remove")
        except DataError as error:
            if error.case != "absent":
                raise

    def _tried(self, work: Callable[[], _T], what: str) -> _T:
        wait = _FIRST_WAIT
        for left in reversed(range(TRIES)):
            try:
                self._fs.invalidate_cache()
                return work()
            except (Abandoned, DataError, MemoryError):
                raise
            except Exception as error:  # libraries of stores raise errors of many kinds and bases
                if not left or _is_final(error):
                    raise self._error(error, what) from None
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT)
        raise AssertionError

    def _error(self, error: Exception, what: str) -> DataError:
        why, fix, case = _told(error)
        return DataError(f"Cannot {what} {self}.", why, fix, case=case)


def _opened(url: str) -> tuple[Any, str]:
    """(the file system of fsspec, the path in it). Raises ConfigError, naming the package that is missing, or for an unknown scheme."""
    scheme = scheme_of(url)
    try:
        import fsspec
    except ImportError:
        raise ConfigError(f"{shown(url)} needs the package fsspec.", "It reads and writes addresses.", _install("fsspec")) from None
    try:
        fs, path = fsspec.core.url_to_fs(url, **_options(scheme))
    except ImportError:
        package = _PACKAGES.get(scheme, f"fsspec[{scheme}]")
        raise ConfigError(f"{shown(url)} needs the package {package}.", f"fsspec reads {scheme}:// with it.", _install(package)) from None
    except ValueError:
        known = ", ".join(f"{name}://" for name in ("s3", "gs", "az", "https"))
        why = "fsspec does not know what it is."
        raise ConfigError(f"{shown(url)} has the scheme {scheme}.", why, f"Take {known}, or a path of this machine.") from None
    if hasattr(fs, "retries"):
        fs.retries = 1  # `_tried` is the one place that tries again
    return fs, path


def _install(package: str) -> str:
    extra = "'smedjan[remote]'" if package in ("fsspec", "s3fs", "aiohttp") else package
    return f"Run: pip install {extra}."


def _options(scheme: str) -> dict[str, Any]:
    """What a file system is made with, beside what its library finds in the environment."""
    patience = timeout()
    if scheme in ("s3", "s3a"):
        limits = {"connect_timeout": patience, "read_timeout": patience, "retries": {"total_max_attempts": 1}}
        return {"config_kwargs": limits, "use_listings_cache": False}
    if scheme in HTTP:
        import aiohttp

        return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=patience, sock_read=patience)}}
    return {}


def timeout() -> float:
    """Seconds that a server may be silent."""
    try:
        return max(0.1, float(os.environ.get(_TIMEOUT, "30")))
    except ValueError:
        raise ConfigError(f"{_TIMEOUT} is no number.", "It is the seconds that a server may be silent.", "Take 30, say.") from None


def _stat(info: dict[str, Any]) -> Stat:
    size = info.get("size")
    names = ("ETag", "etag", "generation", "md5Hash", "Content-MD5", "Last-Modified", "LastModified", "mtime", "created")
    return Stat(int(size) if size is not None else None, next((str(info[name]) for name in names if info.get(name)), ""))


def _is_final(error: Exception) -> bool:
    """Whether trying again cannot help."""
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotImplementedError | ImportError):
        return True
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status < 500 and status not in (0, 408, 425, 429)
    return type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "InvalidURL")


_CREDENTIALS = "Check the credentials: for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the machine's role."
_AGAIN = "Check the connection, and give the same command again."


def _told(error: Exception) -> tuple[str, str, str]:
    """(why, what to do, the case) of what a library raised."""
    status = getattr(error, "status", None)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return "There is nothing at this address.", "Check the address.", "absent"
    if isinstance(error, NotImplementedError):
        return "This kind of store cannot do that.", "Take a store such as s3:// or gs://.", "unable"
    if isinstance(error, PermissionError) or status in (401, 403) or "Credentials" in type(error).__name__:
        return "The store refuses these credentials, or none were found.", _CREDENTIALS, "refused"
    if isinstance(status, int) and status:
        return f"The server answers with status {status}.", _AGAIN, ""
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        return f"The server was silent for {timeout():g} s, {TRIES} times.", f"{_AGAIN[:-1]}; {_TIMEOUT} is how long one waits.", ""
    return f"{harmless(str(error)) or type(error).__name__}.", _AGAIN, ""


def harmless(text: str) -> str:
    """The first line of what a library says, without what may be secret."""
    text = _SECRETS.sub("…", (text.splitlines() or [""])[0])
    for name, value in os.environ.items():
        if len(value) >= 8 and re.search(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", name):
            text = text.replace(value, "…")
    return text[:160].rstrip(".")


def _discard(out: Any) -> None:
    with contextlib.suppress(Exception):  # an error of giving up would hide the one that counts
        out.discard()
    out.closed = True
