"""A safetensors file of anybody: checked by the `safetensors` package, read and written tensor by tensor.

    header length (8 bytes, little-endian) | header (JSON: name -> dtype, shape, data_offsets) | data, no gaps

The package refuses a header whose tensors overlap, leave gaps or do not end where the file does, so a tensor's place follows from
the sizes of those before it. Its own writer wants the whole model in memory; its reader maps the whole file.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np

from convert.portable import Lazy
from smedjan_common.checkpoint.tensors import TensorRecord, header_bytes, is_pickle
from smedjan_common.errors import CheckpointError
from smedjan_common.files.durable import sync

DTYPES: dict[str, np.dtype] = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
PACKED = {**DTYPES, "U32": np.dtype(np.uint32)}  # of quantised models
_CODES = {dtype: code for code, dtype in PACKED.items()}


def open_tensors(path: Path, dtypes: Mapping[str, np.dtype] = DTYPES) -> dict[str, Lazy]:
    """The tensors of a file by name, none of them read yet.

    Raises CheckpointError for a file that is missing, cut short, no safetensors, or has a dtype that is not among `dtypes`.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"{path} is missing.", "The model is incomplete.", "Download it again, or restore it from a copy.")
    try:
        with safe_open(path, "numpy") as file:
            entries = [(name, file.get_slice(name)) for name in file.offset_keys()]
            kinds = [(name, entry.get_dtype(), tuple(entry.get_shape())) for name, entry in entries]
    except (SafetensorError, OSError, ValueError) as error:
        raise _refusal(path, error) from None
    with open(path, "rb") as file:
        position = 8 + int.from_bytes(file.read(8), "little")
    tensors = {}
    for name, code, shape in kinds:
        if code not in dtypes:
            raise CheckpointError(
                f"The tensor {name!r} in {path} has dtype {code}.",
                "It is quantised, or not a weight: only F32, BF16 and F16 can be converted.",
                "Use a copy of the model that is not quantised.",
            )
        tensors[name] = Lazy(dtypes[code], shape, partial(_read, path, name, position, dtypes[code], shape))
        position += tensors[name].nbytes
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, Lazy]) -> None:
    """Write and sync a new file; each tensor is made when its turn comes. Raises OSError."""
    records = {name: TensorRecord(_CODES[tensor.dtype], tensor.shape, 0) for name, tensor in tensors.items()}
    with open(path, "xb") as file:
        file.write(header_bytes(records, {"format": "pt"}))  # without that transformers does not load the file
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor.read()).reshape(-1).view(np.uint8).data)
        file.flush()
        sync(file.fileno())


def _read(path: Path, name: str, position: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    count = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    raw = np.fromfile(path, np.uint8, count, offset=position)
    if len(raw) != count:
        raise CheckpointError(f"{path} is cut short at {name}.", "It became shorter while it was read.", "Try again.")
    return raw.view(dtype).reshape(shape)


def _refusal(path: Path, error: Exception) -> CheckpointError:
    with open(path, "rb") as file:
        pickled = is_pickle(file)
    if pickled:
        return CheckpointError(
            f"{path} is a pickle, not safetensors.",
            "Loading a pickle can run any code, so pickles are never loaded.",
            "Use a copy of the model in safetensors.",
        )
    why = str(error).removeprefix("Error while deserializing header: ")
    return CheckpointError(f"{path} is cut short, damaged or not a safetensors file.", f"Its reader says: {why}.", "Download it again.")
