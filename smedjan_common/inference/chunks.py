"""How tokens are fed in pieces: few shapes are compiled, and no piece overwrites what its own tokens read."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from smedjan_common.model.config import ModelConfig
from smedjan_common.model.mixers import MIXERS
from smedjan_common.model.spec import StateSpec

SHORTEST_READ = 256  # entries of a decode state by position, of which powers of two are read


def by_position(config: ModelConfig, max_len: int) -> list[StateSpec]:
    """The arrays of one row's decode state that keep something of each position, of all layers."""
    specs = (spec for name in dict.fromkeys(config.mixer) for spec in MIXERS[name].state(config, 1, max_len))
    return [spec for spec in specs if spec.axis is not None]


def positions_held(config: ModelConfig, layers: Sequence[Mapping[str, Any]]) -> int:
    """How many positions a decode state holds, the arrays of its layers by name; 0 where none keeps something of each."""
    for layer, arrays in enumerate(layers):
        for spec in MIXERS[config.mixer_of(layer)].state(config, 1, 1):
            if spec.axis is not None and spec.span == 1:
                return arrays[spec.name].shape[spec.axis]
    return 0


def can_rewind(config: ModelConfig) -> bool:
    """Whether all that a row keeps is by position, so that it can go back to an earlier one."""
    return all(spec.axis is not None for name in config.mixer for spec in MIXERS[name].state(config, 1, 1))


def chunk_lengths(config: ModelConfig, max_len: int, position: int, count: int, largest: int) -> Iterator[int]:
    """Lengths, powers of two, that `count` tokens from `position` on are fed in.

    None is longer than `largest` or than what is held; past that, none crosses a border between positions that share an entry of the
    state, since they are overwritten together.
    """
    specs = by_position(config, max_len)
    held = min((_positions(spec) for spec in specs), default=None)
    span = max((spec.span for spec in specs), default=1)
    end = position + count
    while position < end:
        room = min(end - position, largest, held or largest)
        if held is not None and span > 1 and position + _power_of_two(room) > held:
            room = min(room, span - position % span)
        length = _power_of_two(room)
        yield length
        position += length


def read_length(max_len: int, position: int) -> int:
    """How many entries a step reads to see all before `position`: a power of two, or `max_len`, so that few lengths are compiled."""
    length = SHORTEST_READ
    while length < min(position, max_len):
        length *= 2
    return min(length, max_len)


def _positions(spec: StateSpec) -> int:
    assert spec.axis is not None
    return spec.shape[spec.axis] * spec.span


def _power_of_two(most: int) -> int:
    return 1 << (most.bit_length() - 1)
