"""A run folder's checkpoints: which is found, which may go, and what a path that is none is answered."""

import pytest

from smedjan_common.checkpoint import (
    find_checkpoints,
    latest_checkpoint,
    newest,
    prune_checkpoints,
    read_checkpoint,
    read_info,
    tensors,
    verify_checkpoint,
    write_final,
)
from smedjan_common.errors import CheckpointError
from tests.unit.test_checkpoint import assert_same, facts, flip, sample_snapshot, write


def test_the_newest_is_found_by_step_and_junk_is_ignored(tmp_path):
    assert find_checkpoints(tmp_path / "absent") == []
    assert latest_checkpoint(tmp_path / "absent") is None
    for step in (20, 3, 100_000_000):
        write(tmp_path, step)
    write_final(tmp_path, sample_snapshot(), **facts())
    (tmp_path / "step-00000400").mkdir()
    (tmp_path / "step-00000500").write_text("a file")
    (tmp_path / "step-x").mkdir()
    (tmp_path / ".tmp-step-00000900-1-00000000").mkdir()
    (tmp_path / "step-00000600").symlink_to(tmp_path / "nowhere")
    (tmp_path / "step-00000700").symlink_to(tmp_path / "step-00000003", target_is_directory=True)
    (tmp_path / "metrics.jsonl").write_text("{}")
    skipped: list[str] = []
    assert [found.step for found in find_checkpoints(tmp_path, on_skip=skipped.append)] == [3, 20, 100_000_000]
    assert len(skipped) == 2
    assert "step-00000400/checkpoint.json is missing" in skipped[0]
    assert "is of step 3" in skipped[1]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-100000000"
    assert read_checkpoint(tmp_path).step == 100_000_000


def test_the_newest_that_verifies_is_taken_and_broken_ones_are_told(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    flip(tmp_path / "step-00000003" / "optimizer.safetensors", -1)
    (tmp_path / "step-00000002" / "tokenizer.json").unlink()
    skipped: list[str] = []
    assert latest_checkpoint(tmp_path, on_skip=skipped.append) == tmp_path / "step-00000001"
    assert "step-00000002/tokenizer.json is missing" in skipped[0]
    assert "step-00000003/optimizer.safetensors is damaged in nu.norm.weight" in skipped[1]
    assert latest_checkpoint(tmp_path, verify=False) == tmp_path / "step-00000003"
    skipped.clear()
    assert_same(read_checkpoint(tmp_path, on_skip=skipped.append), sample_snapshot(1))
    assert len(skipped) == 2
    with pytest.raises(CheckpointError, match="damaged") as caught:
        read_checkpoint(tmp_path)
    assert caught.value.fix == f"The newest good checkpoint beside it is {tmp_path / 'step-00000001'}."


def test_pruning_keeps_the_newest_and_the_marked_ones(tmp_path):
    for step in (10, 20, 30, 40, 50):
        write(tmp_path, step)
    (tmp_path / "step-00000060").mkdir()
    write_final(tmp_path, sample_snapshot(), **facts())
    assert prune_checkpoints(tmp_path, 0) == []
    assert prune_checkpoints(tmp_path, 9) == []
    assert [path.name for path in prune_checkpoints(tmp_path, 2, keep_every=20)] == ["step-00000010", "step-00000030"]
    assert [path.name for path in prune_checkpoints(tmp_path, 1)] == ["step-00000020", "step-00000040"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "step-00000050", "step-00000060"]
    with pytest.raises(CheckpointError, match="negative"):
        prune_checkpoints(tmp_path, -1)


def test_pruning_a_link_leaves_what_it_points_to(tmp_path):
    elsewhere = write(tmp_path / "disk2", 1)
    write(tmp_path / "run", 2)
    (tmp_path / "run" / "step-00000001").symlink_to(elsewhere, target_is_directory=True)
    prune_checkpoints(tmp_path / "run", 1)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-00000002"]
    verify_checkpoint(elsewhere)


def test_a_path_that_is_no_checkpoint_is_explained(tmp_path):
    path = write(tmp_path / "run")
    for wrong, words in (
        (tmp_path / "run" / "step-00000009", "There is no checkpoint .*The newest complete checkpoint beside it is .*step-00000003"),
        (tmp_path, f"holds no checkpoint.*Give one of its runs, such as {tmp_path / 'run'}."),
        (path / "model.safetensors", "is a file, not a checkpoint.*Give the directory"),
        (tmp_path / "a\0b", "There is no checkpoint"),
    ):
        with pytest.raises(CheckpointError, match=words):
            read_checkpoint(wrong)
    (tmp_path / "model.safetensors").touch()  # of Hugging Face, say
    with pytest.raises(CheckpointError, match=r"smedjan convert .* --to neutral"):
        read_checkpoint(tmp_path)


def test_a_mistyped_path_does_not_hash_the_checkpoint_beside_it(tmp_path, monkeypatch):

    there = write(tmp_path / "run")
    monkeypatch.setattr(tensors, "_read_into", None)  # reading a tensor file would be a TypeError
    for read in (read_checkpoint, read_info, newest):
        with pytest.raises(CheckpointError, match=f"The newest complete checkpoint beside it is {there}"):
            read(tmp_path / "run" / "step-000003")


def test_the_newest_weights_are_those_of_final_unless_a_later_step_was_saved_since(tmp_path):
    run = tmp_path / "run"
    write(run, 3)
    assert newest(run).path == run / "step-00000003"
    for last, name in ((3, "final"), (9, "final"), (2, "step-00000003")):
        write_final(run, sample_snapshot(last), **facts())
        assert newest(run).path == run / name
    assert newest(run / "step-00000003").step == 3
    assert newest(run / "final").step == 2


def test_a_path_can_be_given_from_inside(tmp_path, monkeypatch):
    good, bad = write(tmp_path, 1), write(tmp_path, 2)
    flip(bad / "model.safetensors", -1)
    monkeypatch.chdir(good)
    assert read_checkpoint(".").step == 1
    monkeypatch.chdir(bad)
    with pytest.raises(CheckpointError, match=r"newest good checkpoint beside it is .*step-00000001"):
        read_checkpoint(".")
