"""FLOPs per trained token and peak FLOP/s of known devices, for MFU.

    train FLOPs/token = 6 * active parameters (4 * frozen ones) + 3 * sum over layers of the mixer's own forward FLOPs/token

A causal pair counts once; `full_square=True` counts the whole T x T square, as many papers do.
The output head counts, tied or not; looking a row of the embedding up costs nothing.
"""

import re

from smedjan_common.model.adapters import Adapters, adapter_table
from smedjan_common.model.config import ModelConfig
from smedjan_common.model.ffns import FFNS
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.params import parameter_table

# dense bf16 FLOP/s of the data sheets, by words of the device's name that stand side by side; the first match counts
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    ("h100 pcie", 756e12),
    ("h100 nvl", 835e12),
    ("h100", 989e12),
    ("h200 nvl", 835e12),
    ("h200", 989e12),
    ("gh200", 989e12),
    ("gb200", 2500e12),
    ("b200", 2250e12),
    ("b100", 1800e12),
    ("a100", 312e12),
    ("a800", 312e12),
    ("l40s", 362e12),
    ("l40", 181e12),
    ("l4", 121e12),
    ("a10g", 70e12),
    ("a10", 125e12),
    ("v100 pcie", 112e12),
    ("v100", 125e12),
    ("t4", 65e12),
    ("rtx 5090", 209.5e12),
    ("rtx 4090", 165.2e12),
    ("rtx 3090", 71e12),
    ("m4 max", 34e12),
    ("m3 ultra", 57e12),
    ("m3 max", 28e12),
    ("m2 ultra", 54e12),
    ("m2 max", 27e12),
    ("m1 ultra", 42e12),
    ("m1 max", 21e12),
)

# words that name another chip of the same number, or a slice of it: RTX 4090 Laptop GPU, 3090 Ti, 4090 D, A100 MIG 1g.5gb
ANOTHER_CHIP = {"laptop", "mobile", "ti", "super", "d", "mig"}


def active_params(config: ModelConfig) -> int:
    """Parameters that one token is multiplied with: all of them unless a feed-forward routes or the head is a matrix of its own."""
    shared = sum(spec.size for name, spec in parameter_table(config).items() if name.split(".")[2:3] != ["ffn"])  # layers.{i}.ffn.*
    looked_up = 0 if config.tied_head else config.padded_vocab_size * config.dim
    return shared - looked_up + sum(FFNS[config.ffn_of(layer)].active(config) for layer in range(config.layers))


def forward_flops_per_token(config: ModelConfig, seq_len: int, full_square: bool = False) -> int:
    """FLOPs of the forward pass per token at context `seq_len`."""
    length = seq_len * (2 if full_square else 1)
    mixing = sum(MIXERS[config.mixer_of(layer)].flops(config.at(layer), length) for layer in range(config.layers))
    return 2 * active_params(config) + mixing


def train_flops_per_token(config: ModelConfig, seq_len: int, full_square: bool = False, adapters: Adapters | None = None) -> int:
    """FLOPs of forward and backward per token (the backward counts twice the forward; recomputation is not counted).

    With adapters no gradient of the frozen matrices is computed, which is a third of their work.
    """
    whole = 3 * forward_flops_per_token(config, seq_len, full_square)
    if adapters is None:
        return whole
    trained = sum(spec.size for spec in adapter_table(config, adapters).values())
    return whole - 2 * active_params(config) + 6 * trained


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of the device, or None when it is not known: an RTX A1000 is no A100, a laptop's RTX 4090 no RTX 4090."""
    words = re.findall(r"[a-z0-9]+", device_name.lower())
    if ANOTHER_CHIP & set(words):
        return None
    name = f" {' '.join(words)} "
    return next((flops for part, flops in PEAK_FLOPS if f" {part} " in name), None)
