"""TensorBoard's event files read back: records of (length, crc, event, crc), and what a viewer shows of several of them."""

import struct
from pathlib import Path


def events(folder: Path):
    """Every event of a folder, its files in the order they were begun."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.glob("events.out.tfevents.*"), key=lambda path: path.name):
        raw, at = path.read_bytes(), 0
        while at < len(raw):
            [length] = struct.unpack("<Q", raw[at : at + 8])
            event = Event()
            event.ParseFromString(raw[at + 12 : at + 12 + length])
            yield event
            at += 16 + length


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """name -> step -> value: where a file begins again at a step, what came after it before is gone, as in TensorBoard."""
    shown: dict[str, dict[int, float]] = {}
    for event in events(folder):
        if event.session_log.status == 1:  # START
            shown = {name: {step: value for step, value in values.items() if step < event.step} for name, values in shown.items()}
        for value in event.summary.value:
            if value.WhichOneof("value") == "simple_value":
                shown.setdefault(value.tag, {})[event.step] = value.simple_value
    return shown


def texts(folder: Path) -> dict[tuple[str, int], str]:
    """(name, step) -> text."""
    return {
        (value.tag.removesuffix("/text_summary"), event.step): value.tensor.string_val[0].decode()
        for event in events(folder)
        for value in event.summary.value
        if value.WhichOneof("value") == "tensor"
    }
