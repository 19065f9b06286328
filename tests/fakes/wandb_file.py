"""The history of an offline run of wandb read back: LevelDB's log format (blocks of 32 KiB, records of crc, length, kind), of protobuf."""

import json
import struct
from pathlib import Path
from typing import Any

BLOCK = 32768


def history(file: Path) -> list[dict[str, Any]]:
    """Every logged row."""
    from wandb.proto import wandb_internal_pb2

    rows = []
    for raw in _records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(raw)
        if record.WhichOneof("record_type") == "history":
            rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
    return rows


def _records(raw: bytes):
    at, parts = 7, b""  # after the header
    while at + 7 <= len(raw):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
        length, kind = struct.unpack("<HB", raw[at + 4 : at + 7])
        if not length and not kind:
            return
        parts += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""
