"""JAX's own checkpoints (Orbax) as a source and as a destination, with everything that training goes on from.

Reading and writing Orbax takes JAX, which is imported when such a checkpoint is met and not before, and kept off the GPU.
"""

import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.neutral import about, check_same, float32, found_format, metrics
from convert.portable import Lazy, Portable, check_equal
from smedjan_common.checkpoint import KINDS, ORBAX, newest, start_own, verify_checkpoint
from smedjan_common.checkpoint.lazy import Show, watched
from smedjan_common.checkpoint.manifest import ARRAYS, TOKENIZER
from smedjan_common.checkpoint.tensors import TensorRecord, numpy_dtype
from smedjan_common.errors import ConfigError
from smedjan_common.tokenizer import Tokenizer


def detect(path: Path) -> bool:
    """Whether a directory is an Orbax checkpoint of smedjan, or holds some whose newest is one."""
    return found_format(path) == ORBAX


def read(path: Path) -> Portable:
    """The newest weights under `path`, and the optimizer's state. Every byte is compared with its hash first. Raises CheckpointError."""
    info = newest(path)
    verify_checkpoint(info.path)
    tokenizer = Tokenizer.load(info.path / TOKENIZER) if TOKENIZER in info.files else None
    arrays = _jax().Arrays(info.path / ARRAYS)
    params = {name: _lazy(record, functools.partial(arrays.read, "params", name)) for name, record in info.weights.items()}
    slots = {name: _lazy(record, functools.partial(arrays.read, *_slot_path(name))) for name, record in info.slots.items()}
    source = {"format": KINDS[ORBAX].name, "step": info.step, "framework": info.framework}
    return Portable(info.model, params, tokenizer, info.step, source, slots=slots, info=info)


def write(model: Portable, target: Path, show: Show) -> list[str]:
    """Write `target`: a step checkpoint that JAX goes on from, or weights only. Arrays pass in parts of 256 MiB.

    Raises CheckpointError when it cannot be written or reads back differently.
    """
    params, slots = float32(model.tensors), float32(model.slots)
    jax_side = _jax()

    def write_arrays(folder: Path) -> Any:
        arrays = watched({**params, **slots}, "write", show)
        jax_side.write_arrays(folder, _in_order(model, params, slots, arrays))
        return lambda: None

    finish = start_own(
        target.parent,
        write_arrays,
        about(model),
        kind=KINDS[ORBAX].name,
        step=model.step,
        params=params,
        optimizer_arrays=slots,
        metrics=metrics(model),
        name=target.name,
    )
    finish()
    again = read(target)
    check_equal(str(target), {**again.tensors, **again.slots}, watched({**params, **slots}, "verify", show))
    check_same(target, again, model)
    return []


def _in_order(
    model: Portable, params: Mapping[str, Lazy], slots: Mapping[str, Lazy], arrays: Mapping[str, Lazy]
) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    """The leaves of the tree that training keeps, each read when its turn comes."""
    yield ("step",), np.asarray(model.step, np.int32)
    for name in params:
        yield ("params", name), arrays[name].read()
    for name in slots:
        yield _slot_path(name), arrays[name].read()


def _slot_path(name: str) -> tuple[str, str, str]:
    slot, _, parameter = name.partition(".")
    return "slots", slot, parameter


def _lazy(record: TensorRecord, read: Any) -> Lazy:
    return Lazy(numpy_dtype(record.dtype), record.shape, read)


def _jax() -> Any:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX is imported: arrays only pass through the host
    try:
        from smedjan_jax import checkpoint
    except ImportError as error:
        why = f"{error.name} is not installed."
        raise ConfigError("Orbax checkpoints are read and written by JAX.", why, "pip install 'smedjan[cpu]'") from None
    return checkpoint
