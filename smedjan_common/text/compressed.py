"""The bytes of an input, decompressed and checked to their end, whatever library reads them.

Libraries raise what they like for a damaged file, some of it no OSError and most of it without the file's name; `named` turns all of it
into errors that name the file. Zstandard is read here frame by frame, because its readers take a file that ends in the middle of a
frame, or after the first of several, for a whole one. Windows are up to 2 GiB, which `zstd --long=31` writes.
"""

import bz2
import contextlib
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from smedjan_common.errors import DataError
from smedjan_common.remote.address import Address

_WINDOW_LOG = 31
_FED = 1 << 12  # compressed bytes at a time: a block of 128 KiB may come from four of them
_DAMAGED = "The file is damaged or cut short; get it again."
# (module, exception): looked for among the modules that are loaded when something was raised
_LIBRARY_ERRORS = (("zstandard", "ZstdError"), ("compression.zstd", "ZstdError"), ("pyarrow", "ArrowException"))


def open_raw(path: Path | Address) -> BinaryIO:
    """The content of a file, decompressed as its suffix says. Raises OSError, DataError."""
    opener, is_here = OPENERS.get(path.suffix.lower()), isinstance(path, Path)
    if opener is None:
        return open(path, "rb", buffering=0) if is_here else open_bytes(path)
    return opener(path if is_here else open_bytes(path))


def open_bytes(path: Path | Address) -> BinaryIO:
    """A file or an object as it is. Raises OSError, DataError."""
    if isinstance(path, Address):
        from smedjan_common.remote.reading import open_remote

        return open_remote(path)
    return open(path, "rb")


@contextlib.contextmanager
def named(path: Path | Address | str, what: str = "Cannot decompress") -> Iterator[None]:
    """What libraries raise while they read `path`, as DataError or OSError with its name."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except _library_errors() as error:
        raise DataError(f"{what} {str(path)!r}.", _sentence(error), _DAMAGED) from None
    except OSError as error:
        if error.errno is None:  # bz2 and pyarrow say so of what is in the file
            raise DataError(f"{what} {str(path)!r}.", _sentence(error), _DAMAGED) from None
        error.filename = error.filename or str(path)
        raise


def _library_errors() -> tuple[type[BaseException], ...]:
    loaded = [getattr(sys.modules[module], name) for module, name in _LIBRARY_ERRORS if module in sys.modules]
    return (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, *loaded)


def _sentence(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{lines[0].rstrip('.')}." if lines else ""


class ZstdFrames(io.RawIOBase):
    """The content of all frames of a Zstandard file. `new()`: a decompressor of one frame (`decompress`, `eof`, `unused_data`).

    Raises EOFError where the file ends inside a frame.
    """

    def __init__(self, file: Path | BinaryIO, new: Callable[[], Any]):
        self._file, self._new = open(file, "rb") if isinstance(file, Path) else file, new  # noqa: SIM115
        self._frame, self._ready = None, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            fresh = (self._frame.unused_data if self._frame and self._frame.eof else b"") or self._file.read(_FED)
            if not fresh:
                if self._frame and not self._frame.eof:
                    raise EOFError("Compressed file ended before its end of frame was reached")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._new()
            self._ready = memoryview(self._frame.decompress(fresh))
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_zstd(file: Path | BinaryIO) -> BinaryIO:
    return io.BufferedReader(ZstdFrames(file, _zstd_frame(str(getattr(file, "name", file)))), 1 << 17)


def _zstd_frame(name: str) -> Callable[[], Any]:
    """What makes decompressors: of Python 3.14's own library, or of the package zstandard."""
    try:
        from compression import zstd  # pyright: ignore[reportMissingImports]

        return lambda: zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG})
    except ImportError:
        pass
    try:
        import zstandard
    except ImportError:
        what = f"Cannot read {name!r}."
        raise DataError(what, "Zstandard files need the package zstandard.", "Run: pip install zstandard.") from None
    return lambda: zstandard.ZstdDecompressor(max_window_size=1 << _WINDOW_LOG).decompressobj()


OPENERS: dict[str, Callable[[Any], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd}
COMPRESSED = tuple(OPENERS)
