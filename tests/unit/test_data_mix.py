"""Mixtures: exact shares, every window once per epoch, no document twice, the same on any number of hosts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smedjan_common.commands import hash as hash_command
from smedjan_common.commands import mix as mix_command
from smedjan_common.data.batches import batches
from smedjan_common.data.mix import mix
from smedjan_common.data.mixture import BLOCK, MixedOrder, Mixture, parse_shards, shares
from smedjan_common.data.prepare import prepare
from smedjan_common.data.token_file import TokenFile, TokenFileWriter
from smedjan_common.errors import DataError
from smedjan_common.tokenizer import Tokenizer


def write(path, documents, tokenizer_hash="same", vocab_size=60_000):
    with TokenFileWriter(path, vocab_size, tokenizer_hash) as writer:
        for document in documents:
            writer.append(np.array(document), np.array([0]), len(document))
    return TokenFile.open(path)


def documents_of(path) -> list[list[int]]:
    file = TokenFile.open(path)
    file.verify()
    ends = [*file.documents.tolist()[1:], file.num_tokens]
    return [file.tokens[start:end].tolist() for start, end in zip(file.documents.tolist(), ends, strict=True)]


@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=6), total=st.integers(10_000_000, 20_000_000))
@settings(max_examples=100, deadline=None)
def test_shares_are_whole_and_nearest(weights, total):
    counts = shares(weights, total)
    assert counts.sum() == total
    assert np.abs(counts - np.array(weights) / sum(weights) * total).max() <= 1


@pytest.mark.parametrize("weights", [[0.5, 0.0], [1, -1], [float("nan"), 1], [1, 1e-9]])
def test_weights_that_cannot_be_are_refused(weights):
    with pytest.raises(DataError, match="weight") as caught:
        shares(weights, BLOCK)
    assert caught.value.why
    assert "[" not in str(caught.value)


def test_every_block_has_the_same_shares_and_every_file_its_own_epochs():
    order = MixedOrder([70, 5, 200], [0.7, 0.1, 0.2], 16, 3)
    assert order.num_windows == [70, 5, 200]
    drawn = [order.windows(step) for step in range(4 * BLOCK // 16)]
    file, window = (np.concatenate(part) for part in zip(*drawn, strict=True))
    for block in range(4):
        inside = slice(block * BLOCK, (block + 1) * BLOCK)
        assert np.bincount(file[inside]).tolist() == order.counts.tolist()
        for number, n in enumerate(order.num_windows):
            assert window[inside][file[inside] == number].max() < n
    per_file = [np.bincount(window[file == number], minlength=n) for number, n in enumerate(order.num_windows)]
    for seen in per_file:  # whole epochs give every window equally often; the last, open one at most once more
        assert seen.max() - seen.min() <= 1
    assert (np.diff(file) == 0).mean() < 0.7  # well mixed inside a block


@given(step=st.integers(0, 10**8), hosts=st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=50, deadline=None)
def test_hosts_read_disjoint_rows_that_make_up_the_batch(step, hosts):
    order = MixedOrder([499, 29], [3, 1], 8, 1)
    whole = order.windows(step)
    parts = [order.windows(step, slice(host * 8 // hosts, (host + 1) * 8 // hosts)) for host in range(hosts)]
    for number in range(2):
        assert np.array_equal(np.concatenate([part[number] for part in parts]), whole[number])


def test_mixed_batches_read_the_windows_of_their_files(tmp_path):
    first = write(tmp_path / "a.bin", [range(0, 1000)])
    second = write(tmp_path / "b.bin", [range(2000, 2500)])
    mixed = batches(Mixture((first, second), (0.5, 0.5)), 9, 4, 0)
    assert mixed.num_windows == batches(first, 9, 4, 0).num_windows + batches(second, 9, 4, 0).num_windows
    seen = set()
    for step in range(100):
        inputs, targets, _ = mixed.batch(step)
        assert inputs.dtype == targets.dtype == np.int32
        assert np.array_equal(targets, inputs + 1)
        assert np.array_equal(inputs, mixed.batch(step)[0])
        seen |= set(inputs[:, 0].tolist())
    assert min(seen) == 0
    assert max(seen) >= 2000
    with pytest.raises(DataError, match="different tokenizers"):
        Mixture((first, write(tmp_path / "c.bin", [range(100)], "other")), (1, 1))


def test_files_whose_documents_begin_otherwise_are_not_mixed(tmp_path):
    for name, begins in (("a", {"bos_id": 1}), ("b", {"bos_id": None}), ("older", {})):
        with TokenFileWriter(tmp_path / f"{name}.bin", 5000, "hash", begins) as writer:
            writer.append(np.arange(100), np.array([0]), 100)
    a, b, older = (TokenFile.open(tmp_path / f"{name}.bin") for name in ("a", "b", "older"))
    Mixture((a, older), (1, 1))
    with pytest.raises(DataError, match=r"b\.bin.* they begin with token 1 and no token"):
        Mixture((a, older, b), (1, 1, 1))
    with pytest.raises(DataError, match="do not begin alike"):
        mix([(tmp_path / "a.bin", 1), (tmp_path / "b.bin", 1)], tmp_path / "m.bin", seed=5)
    assert not (tmp_path / "m.bin").exists()


def test_a_mixed_file_has_the_shares_and_no_document_twice(tmp_path):
    draw = np.random.Generator(np.random.PCG64(0))
    first = [[number] * int(draw.integers(1, 40)) for number in range(1, 2000)]
    second = [[number] * int(draw.integers(1, 400)) for number in range(3000, 3400)]
    write(tmp_path / "a.bin", first)
    write(tmp_path / "b.bin", second)
    parts = mix([(tmp_path / "a.bin", 0.7), (tmp_path / "b.bin", 0.3)], tmp_path / "m.bin", seed=5)
    mixed = documents_of(tmp_path / "m.bin")
    names = [document[0] for document in mixed]
    assert len(set(names)) == len(names)
    originals = {document[0]: document for document in first + second}
    assert all(document == originals[document[0]] for document in mixed)
    total = sum(map(len, mixed))
    assert abs(parts[0].tokens / total - 0.7) < 0.01
    assert sum(part.documents for part in parts) == len(mixed)
    assert any(part.documents == part.all_documents for part in parts)  # it ends when a file is used up
    half = names[: len(names) // 2]
    assert 0.6 < sum(len(originals[name]) for name in half if name < 3000) / sum(len(originals[name]) for name in half) < 0.8
    mix([(tmp_path / "a.bin", 0.7), (tmp_path / "b.bin", 0.3)], tmp_path / "again.bin", seed=5)
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "m.bin").read_bytes()
    parts = mix([(tmp_path / "a.bin", 1), (tmp_path / "b.bin", 1)], tmp_path / "n.bin", tokens=5000)
    assert 5000 <= sum(part.tokens for part in parts) < 5400


@pytest.mark.parametrize("text", ["", "a.bin:x", ","])
def test_shards_that_cannot_be_read_are_refused(text):
    with pytest.raises(DataError, match="PATH:WEIGHT"):
        parse_shards(text)


def test_the_share_that_was_asked_for_stands_beside_the_one_that_files_of_one_document_give(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("long.bin", [range(90)])
    write("short.bin", [range(10)])
    assert mix_command.main(["--shards", "long.bin:0.25,short.bin:0.75", "--output", "m.bin"]) == 0
    out = capsys.readouterr().out
    assert "long.bin: 90.0% (25.0% asked for)" in out
    assert "short.bin: 10.0% (75.0% asked for)" in out


def test_mix_and_hash_as_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = Tokenizer.train_from_texts(["iron and fire " * 9], 300)
    tokenizer.save("t.json")
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name} iron {n}"}}\n' for n in range(50)))
        prepare([f"{name}.jsonl"], f"{name}.bin", tokenizer)
    arguments = ["--shards", "a.bin:0.5,b.bin:0.5", "--output", "m.bin", "--tokenizer", "t.json"]
    assert mix_command.main(arguments) == 0
    assert "50.0%" in capsys.readouterr().out
    size = TokenFile.open("a.bin").num_bytes + TokenFile.open("b.bin").num_bytes
    assert TokenFile.open("m.bin").num_bytes == size
    assert mix_command.main(arguments) == 2
    assert mix_command.main(["--shards", "missing.bin:1", "--output", "x.bin"]) == 2
    capsys.readouterr()
    assert hash_command.main(["m.bin", "t.json", "a.jsonl"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(TokenFile.open("m.bin").hash)
    assert lines[1].startswith(tokenizer.hash)
    (tmp_path / "m.bin").write_bytes(b"\1" * (tmp_path / "m.bin").stat().st_size)
    assert hash_command.main(["m.bin"]) == 2
    assert "was changed" in capsys.readouterr().err


@pytest.mark.parametrize("packing", ["windows", "documents"])
def test_mixed_batches_know_the_documents_of_their_files(tmp_path, packing):
    """Tokens of a document are equal here, so the document numbers must change exactly where the tokens do."""
    first = write(tmp_path / "a.bin", [[i] * (3 + i % 5) for i in range(1, 200)])
    second = write(tmp_path / "b.bin", [[i] * 30 for i in range(300, 330)])
    mixed = batches(Mixture((first, second), (0.5, 0.5)), 16, 8, 0, packing, documents=True)
    for step in range(20):
        inputs, targets, documents = mixed.batch(step)
        counted = targets >= 0
        same = np.diff(documents, axis=1) == 0
        assert np.array_equal(same, np.diff(inputs, axis=1) == 0)
        assert documents.dtype == np.int32
        if packing == "documents":
            assert np.array_equal(inputs[counted], targets[counted])


@pytest.mark.parametrize("path", [".", "/"])
def test_the_hash_of_a_directory_is_refused(path, capsys):
    assert hash_command.main([path]) == 2
    assert "is a directory" in capsys.readouterr().err


@pytest.mark.parametrize("packing", ["windows", "documents"])
@pytest.mark.parametrize("mixed", [False, True])
def test_the_order_of_a_step_is_computed_once_where_documents_are_asked_for(tmp_path, monkeypatch, packing, mixed):
    first = write(tmp_path / "a.bin", [[i] * (3 + i % 5) for i in range(1, 200)])
    data = Mixture((first, write(tmp_path / "b.bin", [[i] * 30 for i in range(300, 330)])), (0.5, 0.5)) if mixed else first
    with_documents, without = batches(data, 16, 8, 0, packing, documents=True), batches(data, 16, 8, 0, packing)
    asked, kind = [], type(with_documents.order)
    windows = kind.windows
    monkeypatch.setattr(
        type(with_documents.order), "windows", lambda self, step, rows=None: asked.append(step) or windows(self, step, rows)
    )
    for step in (0, 7):
        one, other = with_documents.batch(step), without.batch(step)
        assert np.array_equal(one.inputs, other.inputs)
        assert np.array_equal(one.targets, other.targets)
        assert (one.documents is None, other.documents is None) == (False, True)
    assert asked == [0, 0, 7, 7]
