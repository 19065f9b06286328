"""The order of batches: a permutation for every length, another one each epoch, the same on any number of hosts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smedjan_common.data.batches import batches
from smedjan_common.data.order import BatchOrder, eval_batches, permute
from smedjan_common.data.token_file import TokenFile, TokenFileWriter
from smedjan_common.errors import DataError

FROZEN_EPOCH_0 = [766, 841, 951, 384, 169, 559, 389, 676]
FROZEN_STEP_3 = [922, 773, 405, 697, 36, 40]


def token_file(path, count: int, vocab_size: int = 300) -> TokenFile:
    with TokenFileWriter(path / "t.bin", vocab_size, "hash") as writer:
        writer.append(np.arange(count) % vocab_size, np.array([0]), count)
    return TokenFile.open(path / "t.bin")


@given(n=st.integers(1, 3000), seed=st.integers(0, 1 << 64), epoch=st.integers(0, 1 << 40))
@settings(max_examples=150, deadline=None)
def test_every_epoch_is_a_permutation_for_every_length(n, seed, epoch):
    assert np.array_equal(np.sort(permute(np.arange(n), n, seed, epoch)), np.arange(n))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 15, 16, 17, 255, 256, 257, 65535, 65536, 65537, 1 << 20])
def test_lengths_around_powers_of_two(n):
    assert np.array_equal(np.sort(permute(np.arange(n), n, 7, 3)), np.arange(n))


def test_places_far_beyond_32_bits():
    n = (1 << 40) + 12345
    places = np.arange(n - 1000, n)
    moved = permute(places, n, 1, 0)
    assert len(set(moved.tolist())) == 1000
    assert moved.min() >= 0
    assert moved.max() < n


def test_the_order_never_changes():
    """These numbers are part of what a checkpoint means: a resumed run reads on where it stopped."""
    assert permute(np.arange(8), 1000, 42, 0).tolist() == FROZEN_EPOCH_0
    assert BatchOrder(1000, 6, 42).windows(3).tolist() == FROZEN_STEP_3


def test_epochs_and_seeds_differ_and_look_random():
    n = 50_000
    first, second, other = permute(np.arange(n), n, 1, 0), permute(np.arange(n), n, 1, 1), permute(np.arange(n), n, 2, 0)
    for left, right in ((first, second), (first, other), (first, np.arange(n)), (first[1:], first[:-1])):
        assert abs(np.corrcoef(left, right)[0, 1]) < 0.03
    assert (np.abs(np.diff(first)) == 1).mean() < 0.001


def test_each_epoch_sees_every_window_once_across_steps():
    order = BatchOrder(num_windows=37, batch_size=5, seed=3)
    assert order.num_windows == 37
    rows = np.concatenate([order.windows(step) for step in range(37)])
    for epoch in range(5):
        assert np.array_equal(np.sort(rows[epoch * 37 : (epoch + 1) * 37]), np.arange(37))
    assert not np.array_equal(rows[:37], rows[37:74])


@given(hosts=st.sampled_from([1, 2, 3, 4, 6, 12]), step=st.integers(0, 10**9), n=st.integers(1, 500))
@settings(max_examples=100, deadline=None)
def test_hosts_read_disjoint_rows_that_make_up_the_batch(hosts, step, n):
    order = BatchOrder(n, 12, 5)
    each = 12 // hosts
    parts = [order.windows(step, slice(host * each, (host + 1) * each)) for host in range(hosts)]
    assert np.array_equal(np.concatenate(parts), order.windows(step))


def test_targets_are_inputs_shifted_by_one(tmp_path):
    order = batches(token_file(tmp_path, 100), 8, 4, 0)
    assert order.num_windows == 12
    assert order.steps_per_epoch == 3
    seen = []
    for step in range(3):
        inputs, targets, documents = order.batch(step)
        assert documents is None
        assert inputs.shape == targets.shape == (4, 8)
        assert inputs.dtype == targets.dtype == np.int32
        assert np.array_equal(inputs[:, 1:], targets[:, :-1])
        assert np.array_equal(targets, inputs + 1)
        seen += (inputs[:, 0] // 8).tolist()
    assert sorted(seen) == list(range(12))
    part = order.batch(2, slice(1, 3)).inputs
    assert np.array_equal(part, order.batch(2).inputs[1:3])


def test_document_numbers_change_where_documents_start(tmp_path):
    lengths = [3, 1, 20, 5, 7, 64, 2]
    with TokenFileWriter(tmp_path / "t.bin", 300, "hash") as writer:
        for number, length in enumerate(lengths):
            writer.append(np.full(length, number), np.array([0]), length)
    order = batches(TokenFile.open(tmp_path / "t.bin"), 8, 4, 0, documents=True)
    for step in range(order.steps_per_epoch):
        inputs, _, documents = order.batch(step)  # every token is the number of its document
        assert np.array_equal(documents, inputs - inputs[:, :1])
        assert np.array_equal(order.batch(step, slice(1, 2)).documents, (inputs - inputs[:, :1])[1:2])
    (tmp_path / "t.bin.offsets").unlink()
    with pytest.raises(DataError, match="no document offsets"):
        batches(TokenFile.open(tmp_path / "t.bin"), 8, 4, 0, documents=True).batch(0)


@pytest.mark.parametrize(("tokens", "says"), [(5, "--seq-len 4"), (1, "more text"), (0, "more text")])
def test_a_file_too_short_for_a_window_says_what_would_fit(tmp_path, tokens, says):
    with pytest.raises(DataError, match=says):
        batches(token_file(tmp_path, tokens), 8, 1, 0)
    with pytest.raises(DataError):
        batches(token_file(tmp_path, 100), 0, 1, 0)


@pytest.mark.parametrize("count", [2, 9, 33, 64, 65, 100])
def test_evaluation_covers_every_target_once(tmp_path, count):
    targets = []
    for inputs, target in eval_batches(token_file(tmp_path, count), 8, 3):
        assert inputs.shape == target.shape == (3, 8)
        real = target >= 0
        assert np.array_equal(target[real], inputs[real] + 1)
        targets += target[real].tolist()
    assert targets == list(range(1, count))


def test_a_short_evaluation_is_spread_over_the_file(tmp_path):
    batches = list(eval_batches(token_file(tmp_path, 8 * 100 + 1, 1000), 8, 2, max_batches=5))
    starts = [row[0] for inputs, _ in batches for row in inputs]
    assert starts == [8 * 10 * i for i in range(10)]


def test_evaluation_of_nothing_is_refused(tmp_path):
    with pytest.raises(DataError, match="two tokens"):
        next(eval_batches(token_file(tmp_path, 1), 8, 2))
