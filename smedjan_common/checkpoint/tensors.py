"""One safetensors file, written and read tensor by tensor, so that N bytes of tensors never need a second N bytes.

    header length (8 bytes, little-endian) | header (JSON: name -> dtype, shape, data_offsets) | data, no gaps

The `safetensors` package reads what is written here and the other way round, but builds the whole file in memory when
it writes and knows no hash; here SHA-256 is taken on the way. Nothing in a file is believed: the caller says which
tensors there must be, and the header must declare exactly these, each byte of the data belonging to exactly one.
"""

import hashlib
import json
import os
import stat
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from smedjan_common.checkpoint.lazy import Lazy
from smedjan_common.errors import CheckpointError, reason, some
from smedjan_common.files.durable import sync

CHUNK_BYTES = 8 << 20
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_CODES = {name: code for code, name in _DTYPES.items()}
_ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "U32": 4}
DTYPES = tuple(_DTYPES)  # what a checkpoint may hold


class TensorRecord(NamedTuple):
    """What the manifest knows of a tensor: dtype ("F32", …), shape, CRC-32 of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    crc32: int

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        size = _ITEM_BYTES[self.dtype]
        for extent in self.shape:
            size *= extent
        return size


class FileRecord(NamedTuple):
    """What the manifest knows of a file: its size in bytes and the SHA-256 of the whole, hexadecimal."""

    bytes: int
    sha256: str


def dtype_code(array: Any) -> str:
    """The safetensors name of an array's dtype; raises KeyError for one that a checkpoint does not hold."""
    return _CODES[np.dtype(array.dtype).name]


def write_order(arrays: Mapping[str, Any]) -> list[str]:
    """The names of tensors in the order in which a file has them."""
    return sorted(arrays, key=lambda name: -_ITEM_BYTES[dtype_code(arrays[name])])  # wide dtypes first: all stay aligned


def write_tensors(path: Path, arrays: Mapping[str, Any]) -> tuple[FileRecord, dict[str, TensorRecord]]:
    """Write and sync a safetensors file; returns its record and, in the order of the file, those of its tensors.

    A value is anything with `.dtype` and `.shape` that `np.asarray` takes; each is turned into NumPy only when its turn comes.
    Raises OSError.
    """
    order = write_order(arrays)
    records = {name: TensorRecord(dtype_code(arrays[name]), tuple(map(int, arrays[name].shape)), 0) for name in order}
    header = header_bytes(records)
    digest = hashlib.sha256(header)
    with open(path, "xb", buffering=0) as file:
        _write_all(file, memoryview(header))
        for name in order:
            crc = 0
            for chunk in _chunks(_bytes_of(np.asarray(arrays[name]))):
                digest.update(chunk)
                crc = zlib.crc32(chunk, crc)
                _write_all(file, chunk)
            records[name] = records[name]._replace(crc32=crc)
        sync(file.fileno())
        return FileRecord(file.tell(), digest.hexdigest()), records


def read_tensors(path: Path, record: FileRecord, tensors: Mapping[str, TensorRecord], *, verify: bool = True) -> dict[str, np.ndarray]:
    """Every tensor of the file, in the order of `tensors`: exactly these, or CheckpointError naming file and tensor."""
    arrays: dict[str, np.ndarray] = {}

    def allocate(name: str) -> memoryview:  # only now: header and size of the file have been checked
        arrays[name] = np.empty(tensors[name].shape, numpy_dtype(tensors[name].dtype))
        return _bytes_of(arrays[name])

    _read_into(path, record, tensors, allocate, verify)
    return {name: arrays[name] for name in tensors}


def check_tensors(path: Path, record: FileRecord, tensors: Mapping[str, TensorRecord]) -> None:
    """Read the whole file without keeping it; raises CheckpointError naming file and tensor when anything differs."""
    scratch = memoryview(bytearray(CHUNK_BYTES))
    _read_into(path, record, tensors, lambda name: _Scratch(scratch, tensors[name].nbytes), verify=True)


def stored(path: Path, record: FileRecord, tensors: Mapping[str, TensorRecord]) -> dict[str, Lazy]:
    """Every tensor of the file, none of them read yet; size and header are checked as `read_tensors` does, hashes are not."""
    with open_regular(path) as file:
        _check_size(path, file, record, tensors)
        order, position, places = _check_header(path, file, record, tensors, hashlib.sha256()), file.tell(), {}
    for name in order:
        places[name], position = position, position + tensors[name].nbytes
    return {name: _later(path, name, places[name], tensors[name]) for name in tensors}


def _later(path: Path, name: str, position: int, tensor: TensorRecord) -> Lazy:
    def read() -> np.ndarray:
        array = np.empty(tensor.shape, numpy_dtype(tensor.dtype))
        with open_regular(path) as file:
            file.seek(position)
            _fill(path, file, _bytes_of(array), name)
        return array

    return Lazy(numpy_dtype(tensor.dtype), tensor.shape, read)


def open_regular(path: Path) -> BinaryIO:
    """Open a file of a checkpoint for reading; raises CheckpointError for a missing one, a link, a device, no permission."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.", "The checkpoint is incomplete.") from None
    except OSError as error:
        why = "It is a symbolic link, and links are not followed." if path.is_symlink() else f"{error.strerror or error}."
        raise CheckpointError(f"{path} cannot be read.", why) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointError(f"{path} cannot be read.", "It is not a regular file.")
    return os.fdopen(fd, "rb", buffering=0)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Hook for json.loads: an object whose keys are all different; raises ValueError naming the one that is not."""
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        raise ValueError(f"the key {next(k for k, _ in pairs if k in seen or seen.add(k))!r} appears twice")
    return values


class _Scratch:
    """Stands for `nbytes` of memory, all of them in one buffer that is written over and over."""

    def __init__(self, buffer: memoryview, nbytes: int):
        self.buffer, self.nbytes = buffer, nbytes

    def __getitem__(self, part: slice) -> memoryview:
        return self.buffer[: min(part.stop, self.nbytes) - part.start]


def _read_into(path: Path, record: FileRecord, tensors: Mapping[str, TensorRecord], target: Any, verify: bool) -> None:
    with open_regular(path) as file:
        _check_size(path, file, record, tensors)
        digest = hashlib.sha256()
        order = _check_header(path, file, record, tensors, digest)
        for name in order:
            for chunk in _chunks(target(name)):
                _fill(path, file, chunk, name)
                if verify:
                    digest.update(chunk)
        if verify and digest.hexdigest() != record.sha256:
            raise CheckpointError(f"{path} is damaged{_damaged(file, order, tensors)}.", "Its SHA-256 is not the one in checkpoint.json.")


def _check_size(path: Path, file: BinaryIO, record: FileRecord, tensors: Mapping[str, TensorRecord]) -> None:
    size = os.fstat(file.fileno()).st_size
    if size == record.bytes:
        return
    why = f"It has {size:,} bytes, checkpoint.json says {record.bytes:,}."
    if is_pickle(file):
        raise CheckpointError(f"{path} is a pickle, not safetensors.", "Loading a pickle can run any code, so pickles are never loaded.")
    if size > record.bytes:
        raise CheckpointError(f"{path} is too long.", why)
    end = record.bytes - sum(tensor.nbytes for tensor in tensors.values())  # where the data starts
    for name, tensor in tensors.items():
        end += tensor.nbytes
        if end > size:
            raise CheckpointError(f"{path} is cut short: {name} is the first tensor that is incomplete.", why)
    raise CheckpointError(f"{path} is cut short.", why)


def _check_header(path: Path, file: BinaryIO, record: FileRecord, tensors: Mapping[str, TensorRecord], digest: Any) -> list[str]:
    """The names in the order of the file, which stands at the first byte of data afterwards."""
    length_bytes = file.read(8)
    length = int.from_bytes(length_bytes, "little")
    if len(length_bytes) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, record.bytes - 8):
        what = "is a pickle, not safetensors" if is_pickle(file) else "has no safetensors header"
        raise CheckpointError(f"{path} {what}.", f"Its first 8 bytes promise a header of {length:,} bytes.")
    raw = bytearray(length)
    _fill(path, file, memoryview(raw), "the header")
    digest.update(length_bytes + raw)
    entries = _parse_header(path, bytes(raw))
    for name in tensors:
        if name not in entries:
            raise CheckpointError(f"{path} lacks the tensor {name}.", "checkpoint.json lists it.")
    position = 0
    for name, entry in entries.items():
        if name not in tensors:
            raise CheckpointError(f"{path} has an extra tensor {name!r}.", "checkpoint.json does not list it.")
        _check_entry(path, name, entry, tensors[name], position)
        position += tensors[name].nbytes
    if 8 + length + position != record.bytes:
        raise CheckpointError(f"{path} has bytes that belong to no tensor.", f"The tensors end at {8 + length + position:,}.")
    return list(entries)


def _parse_header(path: Path, raw: bytes) -> dict[str, dict]:
    """name -> entry, in the order of the data. Only the shape of the JSON is checked."""
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys)
        entries.pop("__metadata__", None)
        return dict(sorted(entries.items(), key=lambda item: (item[1]["data_offsets"][0], item[1]["data_offsets"][1])))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"The header of {path} is not a safetensors header.", reason(error)) from None


def _check_entry(path: Path, name: str, entry: Any, tensor: TensorRecord, position: int) -> None:
    for key, found, expected in (
        ("dtype", entry.get("dtype"), tensor.dtype),
        ("shape", entry.get("shape"), list(tensor.shape)),
        ("data_offsets", entry.get("data_offsets"), [position, position + tensor.nbytes]),
    ):
        if found != expected:
            raise CheckpointError(f"The tensor {name} in {path} has {key} {found!r}.", f"It must be {expected!r}.")


def header_bytes(records: Mapping[str, TensorRecord], metadata: Mapping[str, str] | None = None) -> bytes:
    """What a safetensors file of these tensors, in this order, begins with: the length of its header, and the header."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    position = 0
    for name, tensor in records.items():
        entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, position + tensor.nbytes]}
        position += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts aligned, as the format wants
    return len(text).to_bytes(8, "little") + text


def _bytes_of(array: np.ndarray) -> memoryview:
    """The bytes of an array, little-endian and row by row, without a copy where it is laid out so already."""
    array = np.ascontiguousarray(array)
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return array.reshape(-1).view(np.uint8).data


def _chunks(data: Any) -> Iterator[memoryview]:
    return (data[start : start + CHUNK_BYTES] for start in range(0, data.nbytes, CHUNK_BYTES))


def _write_all(file: BinaryIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]  # a raw write may take a part, or raise when the disk is full


def _fill(path: Path, file: BinaryIO, data: memoryview, name: str) -> None:
    while data:
        try:
            count = file.readinto(data)  # type: ignore[attr-defined]
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read at {name}.", f"{error.strerror or error}.") from None
        if not count:
            raise CheckpointError(f"{path} is cut short at {name}.", "It became shorter while it was read.")
        data = data[count:]


def _damaged(file: BinaryIO, order: list[str], tensors: Mapping[str, TensorRecord]) -> str:
    """Where the damage is: read once more, tensor by tensor."""
    bad = []
    file.seek(-sum(tensor.nbytes for tensor in tensors.values()), os.SEEK_END)
    for name in order:
        crc, left = 0, tensors[name].nbytes
        while left and (chunk := file.read(min(left, CHUNK_BYTES))):
            crc, left = zlib.crc32(chunk, crc), left - len(chunk)
        bad += [name] if crc != tensors[name].crc32 else []
    return f" in {some(bad)}" if bad else " in its header"


def is_pickle(file: BinaryIO) -> bool:
    """Whether an open file begins as a pickle does, or as the zip that torch puts one in."""
    head = os.pread(file.fileno(), 2, 0)
    return head == b"PK" or (head[:1] == b"\x80" and head[1:] in {b"\x02", b"\x03", b"\x04", b"\x05"})


def numpy_dtype(code: str) -> np.dtype:
    """The dtype of a code that checkpoints hold."""
    if code == "BF16":
        import ml_dtypes  # 30 ms that float32 checkpoints need not wait for

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(_DTYPES[code])
