"""How tokens are fed in pieces, and how much of a decode state a step reads."""

import pytest

from smedjan_common.config import ModelConfig
from smedjan_common.inference.chunks import can_rewind, chunk_lengths, read_length


def model(*mixer: str) -> ModelConfig:
    blocks = {"block_size": 12} if "block-sparse" in mixer else {}
    return ModelConfig.build(vocab_size=300, dim=64, layers=len(mixer), heads=4, mixer=mixer, **blocks)


@pytest.mark.parametrize("mixer", [("attention",), ("ssm",), ("block-sparse",), ("attention", "block-sparse", "rwkv")])
@pytest.mark.parametrize("position", [0, 5, 39, 40, 47, 1000])
def test_pieces_are_powers_of_two_that_overwrite_nothing_that_they_read(mixer: tuple[str, ...], position: int):
    held = 40  # of block-sparse 48, which are whole blocks
    lengths = list(chunk_lengths(model(*mixer), held, position, 150, 32))
    assert sum(lengths) == 150
    assert all(length & (length - 1) == 0 and length <= 32 for length in lengths)
    if "block-sparse" in mixer:
        at = position
        for length in lengths:
            assert at + length <= 40 or at // 12 == (at + length - 1) // 12, "across a border of blocks that are overwritten together"
            at += length
    else:
        assert len(lengths) <= 150 // 32 + 5


def test_no_piece_is_longer_than_what_is_held():
    assert max(chunk_lengths(model("attention"), 10, 0, 100, 32)) == 8
    assert max(chunk_lengths(model("ssm"), 10, 0, 100, 32)) == 32


def test_few_lengths_are_read_and_each_holds_all_positions():
    assert {read_length(1000, position) for position in range(2000)} == {256, 512, 1000}
    assert all(read_length(1000, position) >= min(position, 1000) for position in range(2000))
    assert read_length(40, 7) == 40


def test_only_states_by_position_go_back():
    assert can_rewind(model("attention", "mla", "block-sparse"))
    assert not can_rewind(model("attention", "linear"))
