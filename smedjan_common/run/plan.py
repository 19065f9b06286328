"""What a run is about to do, as a table: the heading of every run, and all of a dry run."""

import shutil

from smedjan_common.backend import Device
from smedjan_common.checkpoint import find_base
from smedjan_common.model.adapters import adapted_maps, adapter_table
from smedjan_common.model.config import ModelConfig
from smedjan_common.model.flops import active_params
from smedjan_common.reporting.console import count, flop, size
from smedjan_common.reporting.table import Line, as_table
from smedjan_common.run.decided import Decided, teacher_line
from smedjan_common.run.expected import Expected
from smedjan_common.run.room import existing, needed, room
from smedjan_common.run.teacher import model_of
from smedjan_common.training.memory import checkpoint_bytes


def heading(decided: Decided, device: Device, time: Expected | None = None) -> str:
    """What, on what, from what, how much and where; time: where it is known."""
    return as_table([*_heading(decided, device), *([("time", str(time))] if time else [])])


def plan(decided: Decided, device: Device, time: Expected) -> str:
    """The heading and what it comes to in FLOPs, disk and time."""
    model, train, data = decided.model, decided.train, decided.data
    assert data
    tokens = train.steps * train.batch_size * train.seq_len
    flops = decided.flops_per_token
    if decided.known_steps:
        passes = f"{tokens / data.train.num_tokens:.2f} passes over the data; " if data.train else ""
        work = f"{passes}{flop(flops)} a token, {flop(flops * tokens)} in all"
        often = ", ".join(
            f"{what} {_every(decided.every(name))}" for name, what in _OFTEN.items() if data.val or not data.train or name != "eval_every"
        )
    else:
        work, often = "one pass over the data; how many steps that is, tokenising will tell", ""
    free = shutil.disk_usage(existing(decided.folder)).free
    lines = [
        ("work", work),
        ("disk", f"{size(checkpoint_bytes(model, train))} a checkpoint, {size(free)} free"),
        *([("besides", often)] if often else []),
        ("time", str(time) if decided.known_steps else "not known before tokenising"),
    ]
    return f"{as_table([*_heading(decided, device), *lines])}\nDry run: nothing was written."


def as_list(rows: list[tuple[str, str, str]]) -> str:
    """Flags, their values, and from where they are."""
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {where}" for name, value, where in rows)


def _heading(decided: Decided, device: Device) -> list[Line]:
    known = _device(decided, device), _memory(decided, device), _model(decided.model), *teacher_line(decided), _data(decided)
    return [*known, *_adapters(decided), *_training(decided), _folder(decided)]


def _device(decided: Decided, device: Device) -> Line:
    devices = f"{device.count} x {device.name}" if device.count > 1 else device.name
    kind = f" ({device.kind})" if device.kind != device.name else ""
    mesh = f", mesh {device.mesh}" if device.count > 1 else ""
    kernels = f", kernels {device.kernels}" if device.kernels else ""
    idle = f"; {device.count} of {device.visible} devices, --mesh data={device.visible} takes all" if device.count < device.visible else ""
    return "device", f"{device.backend} on {devices}{kind}, {decided.train.dtype}{mesh}{kernels}{idle}"


def _memory(decided: Decided, device: Device) -> Line:
    there = room(device)
    known = "" if there is None else f", {size(there)} {'free' if device.kind == 'cpu' else 'there'}"
    each = " on each device" if device.count > 1 and device.kind == "gpu" else ""
    return "memory", f"about {size(needed(decided.model, decided.train, device, model_of(decided.teacher)))}{each}{known}"


def _model(model: ModelConfig) -> Line:
    shared = f", {model.kv_heads} key/value heads" if model.kv_heads != model.heads else ""
    shape = f"dim {model.dim}, {model.layers} layers, {model.heads} heads{shared}, vocabulary {model.vocab_size}"
    return "model", f"{count(model.num_params())} parameters{_active(model)}: {shape}"


def _adapters(decided: Decided) -> list[Line]:
    """What is trained beside which weights, where it is not all of them."""
    if not (adapters := decided.train.adapters):
        return []
    trained = count(sum(spec.size for spec in adapter_table(decided.model, adapters).values()))
    rows = f", and rows of {adapters.tokens} new tokens" if adapters.tokens else ""
    maps = f"{len(adapted_maps(decided.model, adapters))} linear maps ({', '.join(adapters.targets)})"
    frozen = decided.pretrained or (find_base(decided.start) if decided.start else None)
    beside = f"beside {frozen.path}, which stays as it is" if frozen else ""
    return [("adapters", f"{trained} parameters, rank {adapters.rank}, alpha {adapters.alpha:g}: {maps}{rows}"), ("", beside)]


def _active(model: ModelConfig) -> str:
    active = active_params(model)
    return f", {count(active)} of them for a token" if active != model.num_params() else ""


def _data(decided: Decided) -> Line:
    data = decided.data
    assert data
    held_out = f", {count(data.val.num_tokens)} to validate on" if data.val else ", nothing to validate on"
    return (
        "data",
        f"{count(data.train.num_tokens)} tokens{held_out}" if data.train else f"{size(data.text_bytes)} of text, not tokenised yet",
    )


def _training(decided: Decided) -> list[Line]:
    model, train = decided.model, decided.train
    tokens = train.steps * train.batch_size * train.seq_len
    each = f" = {count(tokens)} tokens, {tokens / model.num_params():.2g} a parameter" if decided.known_steps else ""
    return [
        ("training", f"{train.steps} steps of {train.batch_size} x {train.seq_len}{each}"),
        ("", f"{train.optimizer}, peak lr {train.lr:g} ({train.lr_schedule}, warm-up {train.warmup})"),
    ]


def _folder(decided: Decided) -> Line:
    if decided.start:
        return "folder", f"{decided.folder}, from step {decided.start.step}"
    return "folder", f"{decided.folder}, a new run{f' from {decided.pretrained.path}' if decided.pretrained else ''}"


_OFTEN = {"eval_every": "an evaluation", "sample_every": "a sample", "checkpoint_every": "a checkpoint"}


def _every(steps: int) -> str:
    return f"every {steps} steps" if steps > 1 else "every step" if steps else "never on the way"
