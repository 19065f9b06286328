"""Whether a model fits into memory to generate with: weights as the checkpoint has them, on the device, and the decode state.

The machine holds them too while they are read; where the device computes in its memory, that is twice. Measured on a CPU with 833 MiB
of weights and no more than a few tokens: JAX takes 2213 MiB where 2066 are estimated, MLX 1723 where 1766 are.
"""

import bisect
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from smedjan_common.backend import Device
from smedjan_common.checkpoint import FORMAT, CheckpointInfo
from smedjan_common.errors import OutOfMemoryError
from smedjan_common.inference.memory import state_bytes
from smedjan_common.machine import available_memory
from smedjan_common.model.config import ModelConfig
from smedjan_common.model.params import count_params, parameter_table
from smedjan_common.model.quantization import FORMAT as QUANTIZED
from smedjan_common.model.quantization import quantized_names
from smedjan_common.reporting.console import size
from smedjan_common.training.memory import PROCESS_BYTES
from smedjan_common.training.precision import BYTES


class Weighed(Protocol):
    """What is known of a model before its weights are read. weights: anything with `nbytes`; format: whether they are read to the host."""

    @property
    def model(self) -> ModelConfig: ...

    @property
    def weights(self) -> Mapping[str, Any]: ...

    @property
    def format(self) -> str: ...


def check_room(
    info: Weighed,
    device: Device,
    dtype: str,
    prompt: int,
    max_tokens: int,
    rows: int = 1,
    scores: bool = False,
    draft: Weighed | None = None,
) -> None:
    """Raises OutOfMemoryError where `rows` texts side by side, each of up to `max_tokens` more than the `prompt` tokens, do not fit.
    Before anything of it is allocated. scores: prompts are scored too. draft: a second model, which guesses ahead."""

    def lacking(tokens: int) -> list[tuple[str, int, int]]:
        return _lacking(info, device, dtype, prompt + tokens, rows, scores, draft)

    if not (short := lacking(max_tokens)):
        return
    place, need, there = short[0]
    fewer = bisect.bisect_left(range(max_tokens), True, key=lambda tokens: bool(lacking(tokens))) - 1
    less = f"Take --max-tokens {fewer}, which fits" if fewer > 0 else "Close other programs, or take a smaller model"
    if rows > 1 and (fits := rows_that_fit(info, device, dtype, prompt + max_tokens, rows, scores, draft)):
        less = f"Answer fewer at once: {fits} fit"
    again = ", and the machine holds them once more while they are read" if info.format == FORMAT else ""
    raise OutOfMemoryError(
        f"To generate takes about {size(need)} of {place}, and {size(there)} are there.",
        f"The weights take {size(_weights(info) + (_weights(draft) if draft else 0))}{again}.",
        f"{less}, or a machine with more memory.",
    )


def rows_that_fit(
    info: Weighed, device: Device, dtype: str, length: int, most: int, scores: bool = False, draft: Weighed | None = None
) -> int:
    """How many texts of `length` tokens fit side by side, at most `most`; 0 where not even one does."""
    return bisect.bisect_left(range(1, most + 1), True, key=lambda rows: bool(_lacking(info, device, dtype, length, rows, scores, draft)))


def _lacking(
    info: Weighed, device: Device, dtype: str, length: int, rows: int, scores: bool, draft: Weighed | None
) -> list[tuple[str, int, int]]:
    state = _state(info, dtype, length, rows) + _working(info, dtype)
    if draft:
        state += _weights(draft) + _state(draft, dtype, length, rows) + _working(draft, dtype)
    if scores and dtype != "float32" and info.format != QUANTIZED:
        state += _weights(info) * BYTES[dtype] // BYTES["float32"]  # those that are decoded with; in float32 they are the same
    return [(place, need, there) for place, need, there in _places(info, device, state) if need > there]


def _places(info: Weighed, device: Device, state: int) -> Iterator[tuple[str, int, int]]:
    """(which memory, bytes that it must hold, bytes that are there), as far as that is known."""
    weights = _weights(info)
    read = weights if info.format == FORMAT else 0  # a backend's own are read to where they stay
    if device.kind != "cpu" and device.memory_bytes is not None:
        yield f"the memory of {device.name}", weights + state, device.memory_bytes
    if (there := available_memory()) is not None:
        held = weights + state + PROCESS_BYTES.get(device.backend, 0) if device.on_host else 0
        yield "memory", read + held, there


def _state(info: Weighed, dtype: str, length: int, rows: int) -> int:
    return state_bytes(info.model, rows, min(length, info.model.context_length), dtype)


def _weights(info: Weighed) -> int:
    if isinstance(info, CheckpointInfo) and info.adapter:  # they are added to those of their base
        return 4 * count_params(info.model)
    return sum(tensor.nbytes for tensor in info.weights.values())


def _working(info: Weighed, dtype: str) -> int:
    """What a step makes besides: of quantised weights the largest, whole."""
    table, quantized = parameter_table(info.model), quantized_names(info.weights)
    return max((table[name].size for name in quantized), default=0) * BYTES[dtype]
