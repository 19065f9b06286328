"""Packing: every (input, target) of every document exactly once, no document that fits is cut, rows nearly full."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smedjan_common.data.batches import batches
from smedjan_common.data.packing import Packed, best_fit, stretches
from smedjan_common.data.token_file import TokenFile, TokenFileWriter
from smedjan_common.errors import DataError


def write(path, lengths) -> TokenFile:
    """Documents whose tokens are all different: token i of the file is i."""
    with TokenFileWriter(path / "t.bin", 1 << 24, "hash") as writer:
        at = 0
        for length in lengths:
            writer.append(np.arange(at, at + length), np.array([0]), length)
            at += length
    return TokenFile.open(path / "t.bin")


@given(lengths=st.lists(st.integers(1, 40), max_size=60), extra=st.integers(0, 10))
@settings(max_examples=200, deadline=None)
def test_rows_never_overflow_and_best_fit_is_never_far_from_the_least(lengths, extra):
    capacity = max(lengths, default=1) + extra
    rows = best_fit(np.array(lengths, np.int64), capacity)
    filled = np.bincount(rows, weights=lengths) if lengths else np.empty(0)
    assert (filled <= capacity).all()
    assert set(rows.tolist()) == set(range(len(filled)))
    assert len(filled) <= 11 / 9 * -(-sum(lengths) // capacity) + 4 or len(filled) <= len([n for n in lengths if 2 * n > capacity]) + 1


def plain_best_fit(lengths, capacity):
    """The definition."""
    room, rows = [], {}
    for number in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [row for row in range(len(room)) if room[row] >= lengths[number]]
        row = min(fitting, key=lambda row: room[row], default=len(room))
        if row == len(room):
            room.append(capacity)
        room[row] -= lengths[number]
        rows[number] = row
    return sorted(room)


@given(lengths=st.lists(st.integers(1, 30), max_size=40))
@settings(max_examples=100, deadline=None)
def test_best_fit_fills_rows_as_its_definition_does(lengths):
    rows = best_fit(np.array(lengths, np.int64), 30)
    room = sorted((30 - np.bincount(rows, weights=lengths)).tolist()) if lengths else []
    assert room == plain_best_fit(lengths, 30)


@pytest.mark.parametrize("seq_len", [4, 16, 64])
def test_every_pair_of_neighbours_in_a_document_is_trained_once(tmp_path, seq_len):
    lengths = [1, 2, 3, 5, 17, 18, 40, 100, 2, 2, 65, 64, 66]
    packed = batches(write(tmp_path, lengths), seq_len, 3, 1, "documents", documents=True)
    ends = set((np.cumsum(lengths) - 1).tolist())
    seen = []
    for row in range(packed.num_windows):
        step, place = divmod(row, 3)
        inputs, targets, documents = packed.batch(step, slice(place, place + 1))
        real = targets >= 0
        assert np.array_equal(targets[real], inputs[real] + 1)
        seen += inputs[real].tolist()
        for number in range(int(documents.max()) + 1):  # a number is one stretch of neighbouring tokens
            assert (np.diff(inputs[0, (documents[0] == number) & real[0]]) == 1).all()
        assert (np.diff(documents[0]) >= 0).all()
    assert sorted(seen) == sorted(set(range(sum(lengths))) - ends)
    whole = packed.batch(0)
    assert whole.inputs.shape == whole.targets.shape == whole.documents.shape == (3, seq_len)


def test_no_document_that_fits_is_cut():
    documents = np.array([0, 10, 20, 100], np.uint64)
    starts, lengths = stretches(documents, 117, 16)
    assert starts.tolist() == [0, 10, 20, 36, 52, 68, 84, 100]
    assert lengths.tolist() == [9, 9, 16, 16, 16, 16, 15, 16]


def test_rows_of_real_lengths_are_nearly_full(tmp_path):
    draw = np.random.Generator(np.random.PCG64(1))
    lengths = np.clip(draw.lognormal(5.5, 1.2, 5000), 2, 20_000).astype(int)
    assert Packed(write(tmp_path, lengths.tolist()), 2048).fill > 0.995


def test_each_epoch_has_every_row_once(tmp_path):
    packed = batches(write(tmp_path, [9] * 40), 16, 4, 3, "documents")
    assert packed.num_windows == 20
    firsts = [packed.batch(step)[0][:, 0] for step in range(10)]
    one, two = np.concatenate(firsts[:5]), np.concatenate(firsts[5:])
    assert len(set(one.tolist())) == 20
    assert sorted(one) == sorted(two)
    assert one.tolist() != two.tolist()


def test_files_that_cannot_be_packed_are_refused(tmp_path):
    file = write(tmp_path, [1, 1])
    with pytest.raises(DataError, match="two tokens"):
        Packed(file, 8)
    (tmp_path / "t.bin.offsets").unlink()
    with pytest.raises(DataError, match="offsets"):
        Packed(TokenFile.open(tmp_path / "t.bin"), 8)
