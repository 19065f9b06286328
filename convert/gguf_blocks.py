"""Quantised weights of ours <-> blocks of llama.cpp, bit for bit: 32 weights of a row are one block.

    Q8_0   d | 32 signed bytes                   w = d q             code = q + 128, bias = -128 d
    Q4_0   d | 16 bytes of two codes each        w = d (q - 8)       bias = -8 d
    Q4_1   d | m | 16 bytes of two codes each    w = d q + m         bias = m

d and m are float16. In a byte of two codes the low half is of the first 16 weights, the high half of the last 16.
"""

from typing import NamedTuple

import numpy as np

from smedjan_common.errors import CheckpointError
from smedjan_common.model.quantization import GROUP
from smedjan_common.model.rounding import Quantized, pack, unpack


class Block(NamedTuple):
    """A kind: bits of a code, bytes of a block; offset: bias = -offset d, None where a block has its own."""

    bits: int
    bytes: int
    offset: int | None


BLOCKS = {"Q8_0": Block(8, 34, 128), "Q4_0": Block(4, 18, 8), "Q4_1": Block(4, 20, None)}
KINDS = {8: "Q8_0", 4: "Q4_1"}  # what a weight of so many bits is written as


def to_blocks(weight: Quantized, kind: str) -> np.ndarray:
    """uint8 [..., blocks * bytes]. Raises CheckpointError where the biases are not those of the kind."""
    row = BLOCKS[kind]
    if row.offset is not None and not np.array_equal(weight.biases, weight.scales * np.float16(-row.offset)):
        why = f"Its groups have biases that {kind} does not have."
        raise CheckpointError(f"A weight cannot be written as {kind}.", why, "Convert the model that was quantised, with --dtype q8_0.")
    codes = unpack(weight.codes, weight.bits).reshape(*weight.scales.shape, GROUP)
    fields = [weight.scales, *([weight.biases] if row.offset is None else [])]
    heads = [np.ascontiguousarray(field.astype("<f2", copy=False))[..., None].view(np.uint8) for field in fields]
    body = codes - np.uint8(128) if row.bits == 8 else _halves(codes)
    return np.concatenate([*heads, body], axis=-1).reshape(*weight.scales.shape[:-1], -1)


def from_blocks(data: np.ndarray, kind: str) -> Quantized:
    """The way back, of uint8 [..., blocks * bytes]."""
    row = BLOCKS[kind]
    blocks = np.ascontiguousarray(data).reshape(*data.shape[:-1], -1, row.bytes)
    values = np.ascontiguousarray(blocks[..., :4]).view("<f2").astype(np.float16, copy=False)
    body = blocks[..., row.bytes - GROUP * row.bits // 8 :]
    codes = body + np.uint8(128) if row.bits == 8 else np.concatenate([body & 15, body >> 4], axis=-1)
    scales = np.ascontiguousarray(values[..., 0])
    with np.errstate(over="ignore"):
        biases = np.ascontiguousarray(values[..., 1]) if row.offset is None else scales * np.float16(-row.offset)
    return Quantized(pack(codes.reshape(*data.shape[:-1], -1), row.bits), scales, biases)


def _halves(codes: np.ndarray) -> np.ndarray:
    return codes[..., : GROUP // 2] | codes[..., GROUP // 2 :] << 4
