"""checkpoint.json: what a checkpoint is, and the hash of everything in it.

    {"format": "smedjan-checkpoint", "format_version": 1, "step", "model", "train", "optimizer", "tokenizer_hash", "dataset",
     "framework", "metrics", "extra", "smedjan_version",
     "files": {FILE: {"bytes", "sha256"}},
     "tensors": {FILE: {NAME: {"dtype", "shape", "crc32"}}},
     "sha256": of the JSON of all the rest: keys sorted, no spaces, ASCII}

A backend's own checkpoint (own.py) has the same keys: "format" says which, "files" lists what the backend wrote below ARRAYS, and
"tensors" {"params": …, "optimizer": …} has no crc32.

Reading believes nothing: every key, type, name and shape is checked before anything is allocated, and each fault is a
CheckpointError. A later format gets a row in READERS; the row of format 1 stays (tests/fixtures/checkpoint-format-1).
"""

import dataclasses
import functools
import hashlib
import json
import math
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smedjan_common.checkpoint.adapter import AdapterRecord, adapter_of
from smedjan_common.checkpoint.tensors import DTYPES, FileRecord, TensorRecord, open_regular, unique_keys
from smedjan_common.errors import CheckpointError, NewerFormatError, SmedjanError, reason
from smedjan_common.files.names import MANIFEST, OPTIMIZER, TOKENIZER, WEIGHTS
from smedjan_common.model.adapters import adapter_table
from smedjan_common.model.config import ModelConfig
from smedjan_common.model.json_fields import MAX_POSITION, is_of, most
from smedjan_common.model.params import differences, parameter_table
from smedjan_common.training.config import TrainConfig

FORMAT, FORMAT_VERSION = "smedjan-checkpoint", 1
ORBAX = "smedjan-orbax"  # JAX's own
ARRAYS, PARAMS, SLOTS = "arrays", "params", "optimizer"  # in a backend's own checkpoint: the folder, and the two groups of tensors
_MAX_MANIFEST_BYTES = 64 << 20


@dataclass(frozen=True)
class CheckpointInfo:
    """What checkpoint.json says. `path` is the checkpoint's directory; `optimizer` is None when it holds weights only.

    format: FORMAT for a neutral one, which has tensors in WEIGHTS and OPTIMIZER; ORBAX, which has PARAMS and SLOTS.
    """

    path: Path
    step: int
    model: ModelConfig
    train: TrainConfig | None
    optimizer: str | None
    tokenizer_hash: str | None
    dataset: dict[str, Any] | None
    framework: dict[str, Any]
    metrics: dict[str, Any] | None
    extra: dict[str, Any] | None
    smedjan_version: str
    files: dict[str, FileRecord]
    tensors: dict[str, dict[str, TensorRecord]]
    format_version: int = FORMAT_VERSION
    format: str = FORMAT

    @property
    def weights(self) -> dict[str, TensorRecord]:
        """The parameters."""
        return self.tensors[WEIGHTS if self.format == FORMAT else PARAMS]

    @property
    def slots(self) -> dict[str, TensorRecord]:
        """The optimizer's arrays; none when it holds weights only."""
        return self.tensors.get(OPTIMIZER if self.format == FORMAT else SLOTS, {})

    @functools.cached_property
    def adapter(self) -> AdapterRecord | None:
        """The adapters that it holds, and their base; None: it holds a whole model. Raises CheckpointError."""
        return adapter_of(self.extra)

    @property
    def nbytes(self) -> int:
        """Bytes of all files but checkpoint.json."""
        return sum(record.bytes for record in self.files.values())


def manifest_text(info: CheckpointInfo) -> str:
    """checkpoint.json. Figures that are not finite become null."""
    values = {"format": info.format, **{f.name: getattr(info, f.name) for f in dataclasses.fields(info) if f.name != "path"}}
    values["model"] = info.model.to_dict()
    values["train"] = info.train.to_dict() if info.train else None
    values["files"] = {name: record._asdict() for name, record in info.files.items()}
    crc = () if info.format == FORMAT else ("crc32",)  # a backend's own files are checked whole
    values["tensors"] = {
        file: {name: {k: v for k, v in t._asdict().items() if k not in crc} for name, t in tensors.items()}
        for file, tensors in info.tensors.items()
    }
    values = json.loads(json.dumps(_plain(values)))  # what is hashed is what will be read: names of dicts are strings now
    return json.dumps(values | {"sha256": manifest_hash(values)}, indent=1, allow_nan=False) + "\n"


def manifest_hash(values: Mapping[str, Any]) -> str:
    """The SHA-256 that `values` should carry under "sha256"."""
    rest = {key: value for key, value in values.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def read_manifest(directory: Path) -> CheckpointInfo:
    """Read and check checkpoint.json; raises CheckpointError naming the file and what in it is wrong.

    NewerFormatError: of a later format.
    """
    path = directory / MANIFEST
    values = _load(path)
    version = values.get("format_version")
    if type(values.get("format")) is not str or values["format"] not in READERS or type(version) is not int:
        raise CheckpointError(f"{path} does not belong to a smedjan checkpoint.", f'Its "format" is {_short(values.get("format"))}.')
    readers = READERS[values["format"]]
    if version not in readers:
        why = f"This smedjan reads format {', '.join(map(str, readers))}."
        if version > max(readers):
            raise NewerFormatError(f"{path} has checkpoint format {version}.", why, "Install a newer smedjan.")
        raise CheckpointError(f"{path} has checkpoint format {version}.", why)
    try:
        intact = manifest_hash(values) == values.get("sha256")
    except (ValueError, RecursionError):
        intact = False
    if not intact:
        raise CheckpointError(f"{path} is damaged, or was edited.", 'Its content does not match its "sha256".')
    try:
        return readers[version](directory, values)
    except SmedjanError as error:
        raise CheckpointError(f"{path} cannot be used: {error.what}", error.why, error.fix) from None
    except (ValueError, TypeError, KeyError, ArithmeticError, AttributeError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be used.", reason(error)) from None


def _load(path: Path) -> dict[str, Any]:
    with open_regular(path) as file:
        raw = file.read(_MAX_MANIFEST_BYTES + 1)
    if len(raw) > _MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{path} is not of a checkpoint.", f"It is larger than {_MAX_MANIFEST_BYTES >> 20} MiB.")
    try:
        values = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys)
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON.", reason(error)) from None
    return values


def _read_format_1(directory: Path, values: dict[str, Any]) -> CheckpointInfo:
    fields = {f.name for f in dataclasses.fields(CheckpointInfo)} - {"path"}
    if odd := fields.symmetric_difference(values.keys() - {"sha256"}):
        raise CheckpointError(f"the keys {', '.join(sorted(map(repr, odd)))} are missing or unknown.", "Format 1 has a fixed set of keys.")
    for key, kinds in _KINDS.items():
        if type(values[key]) not in kinds:
            raise CheckpointError(f'"{key}" is {_short(values[key])}.', "That is the wrong type.")
    if not 0 <= values["step"] <= MAX_POSITION:
        raise CheckpointError(f'"step" is {_short(values["step"])}.', "It counts the optimizer steps done.")
    tensors = {file: {n: _tensor(n, v) for n, v in _dict(entries).items()} for file, entries in values["tensors"].items()}
    files = {name: _file(name, record) for name, record in values["files"].items()}
    (_check_files if values["format"] == FORMAT else _check_own_files)(files, tensors)
    info = CheckpointInfo(
        **{
            **{key: values[key] for key in fields},
            "path": directory,
            "model": checked_config(ModelConfig, values["model"]),
            "train": None if values["train"] is None else checked_config(TrainConfig, values["train"]),
            "files": files,
            "tensors": tensors,
        }
    )
    check_layout(info)
    return info


def _read_own_format_1(directory: Path, values: dict[str, Any]) -> CheckpointInfo:
    described = {group: {n: _dict(v) | {"crc32": 0} for n, v in _dict(entries).items()} for group, entries in values["tensors"].items()}
    return _read_format_1(directory, values | {"tensors": described})


READERS: dict[str, dict[int, Callable[[Path, dict[str, Any]], CheckpointInfo]]] = {
    FORMAT: {1: _read_format_1},
    ORBAX: {1: _read_own_format_1},
}

_KINDS = {
    "step": (int,),
    "model": (dict,),
    "train": (dict, type(None)),
    "optimizer": (str, type(None)),
    "tokenizer_hash": (str, type(None)),
    "dataset": (dict, type(None)),
    "framework": (dict,),
    "metrics": (dict, type(None)),
    "extra": (dict, type(None)),
    "smedjan_version": (str,),
    "files": (dict,),
    "tensors": (dict,),
}


def check_layout(info: CheckpointInfo) -> None:
    """Raises CheckpointError unless the listed tensors are the parameters of the model and optimizer arrays of their shapes."""
    weights, slots = info.weights, info.slots
    where, beside = (WEIGHTS, OPTIMIZER) if info.format == FORMAT else (PARAMS, SLOTS)
    adapters = info.adapter.adapters if info.adapter else None
    if info.model.layers > len(weights) and not adapters:  # before a table of that many layers is made
        raise CheckpointError(f"the model has {info.model.layers:,} layers.", f"{where} has only {len(weights):,} tensors.")
    table = adapter_table(info.model, adapters) if adapters else parameter_table(info.model)
    if wrong := differences(table, weights):
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise CheckpointError(f"{where} does not belong to this model: {wrong[0]}{more}.", "Its tensors differ from the parameter table.")
    for name, tensor in slots.items():
        slot, _, parameter = name.partition(".")
        if not slot.isidentifier() or parameter not in table:
            raise CheckpointError(f"{beside} has a tensor {name!r}.", "It belongs to no parameter of this model.")
        if tensor.shape != table[parameter].shape:
            raise CheckpointError(f"{beside}: {name} has shape {tensor.shape}.", f"{parameter} has {table[parameter].shape}.")
    if (info.optimizer is None) != (beside not in info.tensors):
        raise CheckpointError(f'"optimizer" is {info.optimizer!r}.', f"That does not fit the presence of {beside}.")


def _check_files(files: Mapping[str, FileRecord], tensors: Mapping[str, Any]) -> None:
    if odd := files.keys() - {WEIGHTS, OPTIMIZER, TOKENIZER}:
        raise CheckpointError(f'"files" names {_short(min(odd))}.', f"Format 1 has {WEIGHTS}, {OPTIMIZER} and {TOKENIZER} only.")
    if WEIGHTS not in files or tensors.keys() != files.keys() - {TOKENIZER}:
        raise CheckpointError(f'"files" lists {", ".join(files) or "nothing"}.', "That does not fit the tensors listed.")


def _check_own_files(files: Mapping[str, FileRecord], tensors: Mapping[str, Any]) -> None:
    if odd := [name for name in files if name != TOKENIZER and not _OWN_FILE.fullmatch(name)]:
        raise CheckpointError(f'"files" names {_short(min(odd))}.', f"A backend writes below {ARRAYS} only.")
    if not files.keys() - {TOKENIZER} or not tensors.keys() <= {PARAMS, SLOTS} or PARAMS not in tensors:
        raise CheckpointError(f'"tensors" lists {", ".join(map(_short, tensors)) or "nothing"}.', f"It lists {PARAMS} and {SLOTS}.")


_OWN_FILE = re.compile(rf"{ARRAYS}(/[A-Za-z0-9_][A-Za-z0-9._-]{{0,199}}){{1,8}}", re.ASCII)


def _file(name: str, values: Any) -> FileRecord:
    record = FileRecord(**_dict(values))
    if type(record.bytes) is not int or not 0 <= record.bytes <= MAX_POSITION or type(record.sha256) is not str:
        raise CheckpointError(f'"files" describes {_short(name)} as {_short(values)}.', "It needs a size and a SHA-256.")
    return record


def _tensor(name: str, values: Any) -> TensorRecord:
    tensor = TensorRecord(**_dict(values))
    shape: Any = tensor.shape  # as JSON has it
    sizes_fit = type(shape) is list and len(shape) <= 8 and all(type(extent) is int and 0 <= extent < 1 << 40 for extent in shape)
    if tensor.dtype not in DTYPES or not sizes_fit or type(tensor.crc32) is not int:
        raise CheckpointError(f"the tensor {_short(name)} is described as {_short(values)}.", f"A dtype is {', '.join(DTYPES)}.")
    return tensor._replace(shape=tuple(shape))


def checked_config(cls: type, values: dict[str, Any]) -> Any:
    """A ModelConfig or TrainConfig; types and sizes are checked before its own checks run over them."""
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        if key in hints and not is_of(hints[key], value, most(key)):
            raise CheckpointError(f"{cls.__name__}.{key} is {_short(value)}.", "That is the wrong type or size.")
    return cls.from_dict(values)


def _dict(values: Any) -> dict[str, Any]:
    if type(values) is not dict:
        raise TypeError(f"{_short(values)} is not a JSON object")
    return values


def _plain(value: Any) -> Any:
    """JSON values of what callers hand over: NumPy scalars, paths, tuples; what is not finite is null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, str) else value
    return text if len(text) <= 80 else text[:77] + "..."
