"""Whether a run fits: the memory of its devices and of the machine, and the disk. Said before anything of it is allocated or computed.

A run that does not fit is refused with what would make it fit, the least costly first, each with its own estimate; --force goes on.
"""

import bisect
import contextlib
import dataclasses
import functools
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from smedjan_common.backend import Device
from smedjan_common.checkpoint.directory import step_directories
from smedjan_common.errors import ConfigError, OutOfMemoryError, flag
from smedjan_common.machine import available_memory
from smedjan_common.model.config import ModelConfig
from smedjan_common.model.presets import PRESETS
from smedjan_common.reporting.console import size
from smedjan_common.run.decided import Decided
from smedjan_common.run.flags import TrainFlags
from smedjan_common.run.settings import new_model
from smedjan_common.run.start import New, Say
from smedjan_common.run.teacher import model_of
from smedjan_common.training.config import GRADIENT_CHECKPOINTING, TrainConfig
from smedjan_common.training.memory import (
    PROCESS_BYTES,
    Place,
    by_kernels,
    checkpoint_bytes,
    final_bytes,
    state_bytes,
    teacher_bytes,
    training_bytes,
)
from smedjan_common.training.mesh import ONE_DEVICE, check_mesh, parse_mesh

Models = Callable[[], Mapping[str, ModelConfig]]  # presets that are smaller than the model of the run, the largest first
Change = tuple[str, ModelConfig, TrainConfig]  # flags, and the run with them


def check_room(decided: Decided, device: Device, say: Say) -> None:
    """Raises OutOfMemoryError for a run whose steps do not fit into memory or whose checkpoints do not fit on the disk; with --force it
    only says so."""
    flags, model, train, start = decided.asked.flags, decided.model, decided.train, decided.start
    force = flags.run.force
    smaller = functools.partial(smaller_models, flags, model.vocab_size) if isinstance(decided.begin, New) else dict
    teacher = model_of(decided.teacher)
    check_memory(model, train, device, resumed=start is not None, smaller=smaller, force=force, say=say, teacher=teacher)
    saving = {"checkpoint_every": decided.every("checkpoint_every"), "keep": flags.run.keep, "keep_every": flags.run.keep_every}
    check_disk(decided.folder, model, train, begin=start.step if start else 0, **saving, force=force, say=say)


def smaller_models(flags: TrainFlags, vocab_size: int) -> dict[str, ModelConfig]:
    """The presets before --size with all else as it is, the largest first; those that cannot be are left out."""
    names = list(PRESETS)[: list(PRESETS).index(flags.model.size)] if flags.model.size in PRESETS else []
    found = {}
    for name in reversed(names):
        with contextlib.suppress(ConfigError):
            found[name] = new_model(dataclasses.replace(flags, model=dataclasses.replace(flags.model, size=name)), vocab_size)
    return found


def room(device: Device) -> int | None:
    """Bytes that a run may take on each of its devices; None where that is not known. The memory of a CPU is the machine's, and so is
    that of a GPU that shares it."""
    known = [None if device.kind == "cpu" else device.memory_bytes, available_memory() if device.on_host else None]
    return min((found for found in known if found is not None), default=None)


def needed(model: ModelConfig, train: TrainConfig, device: Device, teacher: ModelConfig | None = None) -> int:
    """Bytes that a run, with its teacher, takes on each of its devices, estimated; where that is the machine's memory, of all devices
    together, with what the process takes besides and the copy of the state that a checkpoint is written from while training goes on."""
    place = Place(device.backend, device.kind, device.versions.get(device.backend, ""), by_kernels(device.kernels))
    step = training_bytes(model, train, parse_mesh(device.mesh) or ONE_DEVICE, place, teacher)
    besides = checkpoint_bytes(model, train) + PROCESS_BYTES.get(device.backend, 0)
    return device.count // device.hosts * step + besides if device.on_host else step


def check_memory(
    model: ModelConfig,
    train: TrainConfig,
    device: Device,
    *,
    resumed: bool,
    smaller: Models,
    force: bool,
    say: Say,
    teacher: ModelConfig | None = None,
) -> None:
    """Raises OutOfMemoryError for a run that its devices, or the machine that writes its checkpoints, cannot hold.

    resumed: what fixes the order of the data stays. smaller: models that may be trained instead.
    """
    there, need = room(device), needed(model, train, device, teacher)
    if there is not None and need > there:
        each = " on each device" if device.count > 1 and not device.on_host else ""
        parts = f" in {train.grad_accum} parts" if train.grad_accum > 1 else ""
        error = OutOfMemoryError(
            f"The run needs about {size(need)} of memory{each}, and {size(there)} are there.",
            f"A step has {train.batch_size} x {train.seq_len} tokens{parts} in {train.dtype}; parameters and optimizer take"
            f" {size(state_bytes(model, train))} of it{_taken_by(teacher, train, device)}.",
            _advice(fitting(model, train, device, there, resumed, smaller, teacher), train, device, teacher),
        )
        _refuse(error, force, say)
    host, copy = available_memory(), checkpoint_bytes(model, train)
    if not device.on_host and host is not None and copy > host:
        what = f"A checkpoint of this run needs {size(copy)} of the machine's memory, and {size(host)} are there."
        why = "The parameters and what the optimizer keeps are brought there to be written."
        _refuse(OutOfMemoryError(what, why, "Take a smaller --size, or --force to go on as it is."), force, say)


def _taken_by(teacher: ModelConfig | None, train: TrainConfig, device: Device) -> str:
    return f", the teacher {size(teacher_bytes(teacher, train, parse_mesh(device.mesh) or ONE_DEVICE))}" if teacher else ""


def fitting(
    model: ModelConfig,
    train: TrainConfig,
    device: Device,
    there: int,
    resumed: bool,
    smaller: Models,
    teacher: ModelConfig | None = None,
) -> list[Change]:
    """Single changes that make a run fit, the least costly first, each as small as helps."""
    found = []
    for changes in _ways(model, train, device, resumed, smaller):
        first = bisect.bisect_left(changes, True, key=lambda change: needed(*change[1:], device, teacher) <= there)
        found += changes[first : first + 1]
    return found


def _ways(model: ModelConfig, train: TrainConfig, device: Device, resumed: bool, smaller: Models) -> Iterator[list[Change]]:
    """Ways to need less, each from its smallest step to its largest: the first leave the result as it is."""
    yield _parts(model, train, device)
    more = GRADIENT_CHECKPOINTING[GRADIENT_CHECKPOINTING.index(train.gradient_checkpointing) + 1 :]
    recomputing = [(f"--gradient-checkpointing {name}", dataclasses.replace(train, gradient_checkpointing=name)) for name in more]
    for flags, changed in recomputing:
        yield [(flags, model, changed)]
    for flags, changed in recomputing[-1:]:
        yield [(f"{flags} {parts}", other, split) for parts, other, split in _parts(model, changed, device)]
    if train.dtype == "float32" and device.kind == "gpu":
        yield [("--dtype bfloat16", model, dataclasses.replace(train, dtype="bfloat16"))]
    if not resumed:
        yield _halves(model, train, device, "batch_size")
        yield _halves(model, train, device, "seq_len")
        yield [(f"--size {name}", other, train) for name, other in smaller().items()]


def _parts(model: ModelConfig, train: TrainConfig, device: Device) -> list[Change]:
    small = [count for count in range(1, math.isqrt(train.batch_size) + 1) if train.batch_size % count == 0]
    counts = sorted({*small, *(train.batch_size // count for count in small)})
    changed = [dataclasses.replace(train, grad_accum=count) for count in counts if count > train.grad_accum]
    return [(f"--grad-accum {parts.grad_accum}", model, parts) for parts in changed if _spreads(model, parts, device)]


def _halves(model: ModelConfig, train: TrainConfig, device: Device, name: str) -> list[Change]:
    values = [getattr(train, name) >> times for times in range(1, getattr(train, name).bit_length())]
    changed = [dataclasses.replace(train, **{name: value}) for value in values]
    return [
        (f"{flag(name)} {getattr(fewer, name)}", model, fewer)
        for fewer in changed
        if fewer.batch_size % fewer.grad_accum == 0 and _spreads(model, fewer, device)
    ]


def _spreads(model: ModelConfig, train: TrainConfig, device: Device) -> bool:
    try:
        check_mesh(parse_mesh(device.mesh) or ONE_DEVICE, model, train.batch_size, train.grad_accum)
    except ConfigError:
        return False
    return True


def _advice(found: list[Change], train: TrainConfig, device: Device, teacher: ModelConfig | None = None) -> str:
    if not found:
        return "No single change makes it fit: combine a smaller --size, --batch-size and --seq-len, or give --force to go on as it is."
    width = max(len(flags) for flags, _, _ in found)
    lines = []
    for flags, model, changed in found:
        names = ("batch_size", "seq_len", "dtype")
        same = "--size" not in flags and all(getattr(train, name) == getattr(changed, name) for name in names)
        lines.append(f"{flags:{width}}  about {size(needed(model, changed, device, teacher))}{', the same result' if same else ''}")
    return "\n         ".join(["One of these makes it fit (--force goes on as it is):", *lines])


def _refuse(error: OutOfMemoryError, force: bool, say: Say) -> None:
    if not force:
        raise error
    say(f"note: {error.what} --force goes on.")


def check_disk(
    folder: Path,
    model: ModelConfig,
    train: TrainConfig,
    *,
    begin: int,
    checkpoint_every: int,
    keep: int,
    keep_every: int,
    force: bool,
    say: Say,
) -> None:
    """Raises OutOfMemoryError when the checkpoints that are on the disk of `folder` at one time do not fit there. begin: the step that
    the run goes on from; the rest as the flags say."""
    total, _, free = shutil.disk_usage(existing(folder))
    one, final = checkpoint_bytes(model, train), final_bytes(model, train)
    there = len(step_directories(folder))  # by their names: the run has read them already
    count = new_checkpoints(begin, train.steps, checkpoint_every, keep, keep_every, there)
    if not total or count * one + final <= free:  # a total of 0: a file system that tells nothing
        return

    def fits(keep: int, keep_every: int) -> bool:
        return new_checkpoints(begin, train.steps, checkpoint_every, keep, keep_every, there) * one + final <= free

    most = bisect.bisect_left(range(1, keep or count), True, key=lambda fewer: not fits(fewer, keep_every))  # --keep that fits; 0: none
    kept = f"--keep {keep} and the one being written" if keep else "--keep 0, which keeps all"
    ones = "1 new one" if count == 1 else f"{count} new ones"
    kept += f", and --keep-every {keep_every}" if keep_every else ""
    ways = (
        (f"--keep {most}", most),
        ("a higher --keep-every", keep and keep_every and fits(keep, 0)),
        ("another disk with --checkpoint-dir", True),
        ("a smaller --size", not begin),  # a run that goes on keeps its model
    )
    error = OutOfMemoryError(
        f"The checkpoints of this run need {size(count * one + final)} of disk, and {size(free)} are free.",
        f"With {kept}, {ones} of {size(one)} {'is' if count == 1 else 'are'} there at one time, beside final/ of {size(final)}.",
        f"Free some space, or take {', '.join(text for text, helps in ways if helps)}, or --force to go on.",
    )
    _refuse(error, force, say)


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def new_checkpoints(begin: int, steps: int, every: int, keep: int, keep_every: int, there: int = 0) -> int:
    """How many more step checkpoints than now a run from `begin` to `steps` has on the disk at one time, at most; `there` are now."""
    if steps <= begin:
        return 0
    saved = 1 + ((steps - 1) // every - begin // every if every else 0)  # the last step is always saved
    if not keep:
        return saved
    common = math.lcm(every, keep_every) if every and keep_every else 0
    forever = (steps - 1) // common - begin // common if common else 0
    return min(saved, keep + 1 - min(there, keep) + forever)
