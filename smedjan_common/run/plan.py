"""What a run is about to do: the heading of every run, and all of a dry run."""

import shutil

from smedjan_common.backend import Device
from smedjan_common.model.config import ModelConfig
from smedjan_common.model.flops import active_params, train_flops_per_token
from smedjan_common.reporting.console import count, flop, size
from smedjan_common.run.decided import Decided
from smedjan_common.run.room import existing, needed, room
from smedjan_common.training.memory import state_bytes


def heading(decided: Decided, device: Device) -> str:
    """Four lines: device, model, data, steps."""
    model, train, data = decided.model, decided.train, decided.data
    assert data
    held_out = f", {count(data.val.num_tokens)} to validate on" if data.val else ", nothing to validate on"
    tokens = f"{count(data.train.num_tokens)} tokens{held_out}" if data.train else f"{size(data.text_bytes)} of text, not tokenised yet"
    devices = f"{device.count} x {device.name}" if device.count > 1 else device.name
    kind = f" ({device.kind})" if device.kind != device.name else ""
    mesh = f", mesh {device.mesh}" if device.count > 1 else ""
    kernels = f", kernels {device.kernels}" if device.kernels else ""
    idle = f"; {device.count} of {device.visible} devices, --mesh data={device.visible} takes all" if device.count < device.visible else ""
    return "\n".join(
        (
            f"device   {device.backend} on {devices}{kind}, {train.dtype}{mesh}{kernels}{idle}",
            f"model    {count(model.num_params())} parameters{_active(model)}: dim {model.dim}, {model.layers} layers, {model.heads} heads"
            f"{f', {model.kv_heads} key/value heads' if model.kv_heads != model.heads else ''}, vocabulary {model.vocab_size}",
            f"data     {tokens}",
            f"training {train.steps} steps of {train.batch_size} x {train.seq_len} tokens, {train.optimizer}, peak lr {train.lr:g}"
            f" ({train.lr_schedule}, warm-up {train.warmup}), into {decided.folder}",
        )
    )


def _active(model: ModelConfig) -> str:
    active = active_params(model)
    return f", {count(active)} of them for a token" if active != model.num_params() else ""


def plan(decided: Decided, device: Device) -> str:
    """The heading and what it comes to in tokens, passes, FLOPs and memory."""
    model, train, data = decided.model, decided.train, decided.data
    assert data
    per_step = train.batch_size * train.seq_len
    tokens = train.steps * per_step
    flops = train_flops_per_token(model, train.seq_len)
    memory, there = needed(model, train, device), room(device)
    lines = [heading(decided, device)]
    if decided.known_steps:
        passes = f", {tokens / data.train.num_tokens:.2f} passes over the data" if data.train else ""
        lines.append(f"tokens   {count(tokens)} in all{passes}; {flop(flops)} a token, {flop(flops * tokens)} in all")
    else:
        lines.append("tokens   one pass over the data; how many steps that is, tokenising will tell")
    known = "" if there is None else f", {size(there)} {'free' if device.kind == 'cpu' else 'there'}"
    lines.append(f"memory   about {size(memory)}{' on each device' if device.count > 1 and device.kind == 'gpu' else ''}{known}")
    lines.append(f"disk     {size(state_bytes(model, train))} a checkpoint, {size(shutil.disk_usage(existing(decided.folder)).free)} free")
    lines.append(f"starts   {f'from {decided.start.path}' if decided.start else 'at step 0'}")
    lines.append("Dry run: nothing was written.")
    return "\n".join(lines)
