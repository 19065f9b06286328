"""Compressed inputs: many frames, long windows, small pieces, and what is damaged."""

import bz2
import gzip
import io
import lzma
import random
import sys
import types

import pytest

from smedjan_common.errors import DataError
from smedjan_common.text import blocks as text_blocks
from smedjan_common.text.compressed import ZstdFrames
from tests.unit.test_data_inputs import LINES, TEXTS, texts_of


def zstd(data: bytes, **options) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor(**options).compress(data)


def test_zstandard_is_read_to_the_end_of_its_last_frame(tmp_path):
    file = tmp_path / "a.jsonl.zst"
    whole = zstd(LINES) + b"\x50\x2a\x4d\x18\x04\0\0\0skip" + zstd(LINES[:0]) + zstd(b'{"text": "last"}\n')
    file.write_bytes(whole)
    assert texts_of(file) == [*TEXTS, "last"]
    for cut in (1, len(zstd(b'{"text": "last"}\n')) - 1):
        file.write_bytes(whole[:-cut])
        with pytest.raises(DataError, match=r"a\.jsonl\.zst.*ended before"):
            texts_of(file)
    file.write_bytes(b"no Zstandard at all")
    with pytest.raises(DataError, match=r"Cannot decompress .*a\.jsonl\.zst"):
        texts_of(file)


def test_a_long_window_is_read(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    parameters = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True, write_content_size=False)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.txt.zst").write_bytes(stream.compress(b"iron\n" * 9) + stream.flush())
    assert texts_of(tmp_path / "a.txt.zst") == ["iron\n" * 9]


def test_zstandard_of_python_itself_is_read_the_same(tmp_path, monkeypatch):
    """compression.zstd of Python 3.14: its decompressor of a frame has the same three members, its own error and another option."""
    zstandard = pytest.importorskip("zstandard")
    own = types.ModuleType("compression.zstd")
    own.ZstdError = type("ZstdError", (Exception,), {})
    own.DecompressionParameter = types.SimpleNamespace(window_log_max=100)

    class Decompressor:
        def __init__(self, options):
            self._frame = zstandard.ZstdDecompressor(max_window_size=1 << options[100]).decompressobj()

        eof = property(lambda self: self._frame.eof)
        unused_data = property(lambda self: self._frame.unused_data)

        def decompress(self, data):
            try:
                return self._frame.decompress(data)
            except zstandard.ZstdError as error:
                raise own.ZstdError("Unable to decompress") from error

    own.ZstdDecompressor = Decompressor
    package = types.ModuleType("compression")
    package.zstd = own
    monkeypatch.setitem(sys.modules, "compression", package)
    monkeypatch.setitem(sys.modules, "compression.zstd", own)
    file = tmp_path / "a.jsonl.zst"
    file.write_bytes(zstd(LINES) * 2)
    assert texts_of(file) == TEXTS * 2
    for content in (zstd(LINES)[:-5], b"nothing of the kind"):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.jsonl\.zst"):
            texts_of(file)


def test_zstandard_is_read_in_small_pieces_too(tmp_path):
    content = random.Random(0).randbytes(200_000)
    (tmp_path / "a.zst").write_bytes(zstd(content[:90_000]) + zstd(content[90_000:]))
    zstandard = pytest.importorskip("zstandard")
    frames = ZstdFrames(tmp_path / "a.zst", lambda: zstandard.ZstdDecompressor().decompressobj())
    parts = []
    while part := frames.read(997):
        parts.append(part)
    assert b"".join(parts) == content


def damaged(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(byte ^ 0xFF for byte in data[middle : middle + 8]) + data[middle + 8 :]


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
def test_what_a_library_says_of_a_damaged_file_has_the_files_name(tmp_path, suffix):
    content = random.Random(1).randbytes(3000).hex().encode()
    checked = lambda data: zstd(data, write_checksum=True)  # noqa: E731
    compress = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": checked}
    for name, data in (("flipped", damaged(compress[suffix](content))), ("junk", b"\x1f\x8bBZh9 junk junk junk")):
        file = tmp_path / f"{name}.txt.{suffix}"
        file.write_bytes(data)
        with pytest.raises(DataError, match=f"{name}.txt.{suffix}"):
            texts_of(file)


def test_a_disk_that_fails_while_reading_names_the_file(tmp_path, monkeypatch):
    class Failing(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            raise OSError(5, "Input/output error")

    (tmp_path / "a.txt").write_text("iron")
    monkeypatch.setattr(text_blocks, "open_raw", lambda path: Failing())
    with pytest.raises(OSError, match="Input/output") as caught:
        texts_of(tmp_path / "a.txt")
    assert caught.value.filename == str(tmp_path / "a.txt")
