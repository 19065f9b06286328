"""What a resumed run takes from the run, what it refuses, what it tells; and that no run is ever written over."""

import json
import shutil

import pytest

from smedjan_common.checkpoint import read_info, verify_checkpoint
from smedjan_common.reporting.metrics import read_rows, train_rows
from smedjan_common.run.folder import read_config
from tests.fakes.runs import arguments, saved_steps, train_here, tree, write_text
from tests.unit.test_checkpoint_faults import value


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A text, and a run of 12 steps on it."""
    folder = tmp_path_factory.mktemp("finished")
    text = write_text(folder)
    assert train_here(*arguments(text, folder / "run", 12, "--checkpoint-every", 4, "--log-every", 2)) == 0
    return folder


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path / "run"


def test_flags_that_are_not_given_come_from_the_run_even_in_another_place(run):
    assert train_here("--checkpoint-dir", run, "--steps", 16) == 0
    assert read_info(run).train.batch_size == 4
    assert read_info(run).train.lr == 0.02
    assert read_config(run)["flags"]["checkpoint_every"] == 4
    assert [row["step"] for row in train_rows(read_rows(run))][-2:] == [14, 16]


@pytest.mark.parametrize(
    ("flag", "value", "shown"),
    [
        ("--dim", 32, "dim is 16 there, 32 now"),
        ("--heads", 4, "heads is 2 there, 4 now"),
        ("--size", "tiny", "dim is 16 there, 128 now"),
        ("--batch-size", 8, "--batch-size is 4 there, 8 now"),
        ("--seq-len", 32, "--seq-len is 16 there, 32 now"),
        ("--seed", 1, "--seed is 0 there, 1 now"),
        ("--rope-base", 500.0, "rope_base is 10000.0 there, 500.0 now"),
    ],
)
def test_what_defines_the_run_is_refused_with_the_difference(run, capsys, flag, value, shown):
    before = tree(run)
    assert train_here("--checkpoint-dir", run, "--steps", 20, flag, value) == 2
    assert shown in capsys.readouterr().err
    assert tree(run) == before


def test_other_flags_count_from_here_on_with_a_note(run, finished, capsys):
    assert train_here("--checkpoint-dir", run, "--steps", 14, "--lr", 0.01, "--log-every", 1, "--grad-accum", 2) == 0
    out = capsys.readouterr().out
    assert "note: lr: 0.02 in the checkpoint, 0.01 now" in out
    assert "note: grad_accum: 1 in the checkpoint, 2 now" in out
    assert [row["step"] for row in train_rows(read_rows(run))][-2:] == [13, 14]


def test_another_text_with_the_same_tokenizer_is_told(run, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("a quite different text, and a short one, on other cats\n" * 60)
    assert train_here("--checkpoint-dir", run, "--steps", 14, "--dataset", other) == 0
    assert "note: dataset:" in capsys.readouterr().out


def test_another_validation_leaves_what_is_trained_on_as_it_was(run, tmp_path, capsys):
    before, held_out = read_config(run)["dataset"], read_config(run)["val_dataset"]["hash"]
    other = tmp_path / "other.txt"
    other.write_text("a quite different text, and a short one, on other cats\n" * 60)
    assert train_here("--checkpoint-dir", run, "--steps", 14, "--val-dataset", other) == 0
    out = capsys.readouterr().out
    assert "note: dataset:" not in out
    assert read_config(run)["dataset"] == before
    now = read_config(run)["val_dataset"]["hash"]
    assert now not in {held_out, before["hash"]}
    assert f"note: val_dataset: {held_out[:16]}… in the run, {now[:16]}… now" in out
    assert train_here("--checkpoint-dir", run, "--steps", 15) == 0
    assert read_config(run)["val_dataset"]["hash"] == now, "it is the run's from then on"


def test_another_part_to_hold_out_is_refused_where_token_files_stand(run, capsys):
    before = tree(run)
    assert train_here("--checkpoint-dir", run, "--steps", 14, "--val-fraction", 0.3) == 2
    assert "--val-fraction would do nothing" in capsys.readouterr().err
    assert tree(run) == before
    assert train_here("--checkpoint-dir", run, "--steps", 14, "--val-fraction", 0.1) == 0


def test_the_size_of_a_vocabulary_that_was_asked_for_is_no_hindrance_to_go_on(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\n" * 40)  # too little for as many tokens as are asked for
    words = [*arguments(text, tmp_path / "run", 2, "--eval-every", 0), "--vocab-size", 4000]
    assert train_here(*words) == 0
    has = read_info(tmp_path / "run").model.vocab_size
    assert has < 4000
    for size in (4000, has):
        assert train_here(*words, "--vocab-size", size, "--steps", 3) == 0
    capsys.readouterr()
    assert train_here(*words, "--vocab-size", has + 1, "--steps", 4) == 2
    assert f"--vocab-size {has + 1} is not that of the run, which has {has} tokens" in capsys.readouterr().err


def test_never_refuses_a_folder_with_a_run(run, finished, capsys):
    before = tree(run)
    assert train_here(*arguments(finished / "text.txt", run, 20, "--resume", "never")) == 2
    assert "already has a run" in capsys.readouterr().err
    assert tree(run) == before


def test_a_path_goes_on_in_another_folder_with_its_history(run, tmp_path):
    new = tmp_path / "new"
    assert train_here("--resume", run / "step-00000008", "--checkpoint-dir", new, "--steps", 10, "--log-every", 2) == 0
    assert [row["step"] for row in train_rows(read_rows(new))] == [1, 2, 4, 6, 8, 10]
    assert saved_steps(new) == [10]


def test_an_older_checkpoint_is_refused_where_newer_ones_stand(run, capsys):
    before = tree(run)
    assert train_here("--resume", run / "step-00000008", "--checkpoint-dir", run, "--steps", 20) == 2
    assert "step-00000012" in capsys.readouterr().err
    assert tree(run) == before


def test_weights_only_are_no_run_to_go_on_with(run, tmp_path, capsys):
    assert train_here("--resume", run / "final", "--checkpoint-dir", tmp_path / "new", "--steps", 20) == 2
    assert "weights only" in capsys.readouterr().err


def test_a_broken_newest_checkpoint_is_told_and_the_one_before_taken(run, capsys):
    weights = run / "step-00000012" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    assert train_here("--checkpoint-dir", run, "--steps", 13) == 0
    out = capsys.readouterr().out
    assert "step-00000012" in out
    assert "Going on from" in out
    assert [row["step"] for row in train_rows(read_rows(run))] == [1, 2, 4, 6, 8, 10, 12, 13]


def test_a_flipped_bit_in_the_newest_is_found_while_it_is_read_and_the_one_before_taken(run, capsys):
    weights = run / "step-00000012" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-3] ^= 1
    weights.write_bytes(raw)
    assert train_here("--checkpoint-dir", run, "--steps", 13) == 0
    out = capsys.readouterr().out
    assert f"note: {weights} is damaged in " in out
    assert f"Going on from {run / 'step-00000008'}, step 8 of 13" in out
    assert [row["step"] for row in train_rows(read_rows(run))] == [1, 2, 4, 6, 8, 10, 12, 13]
    verify_checkpoint(run / "step-00000012")


def test_only_flipped_bits_are_never_written_over(run, capsys):
    for weights in run.glob("step-*/model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    before = tree(run)
    assert train_here("--checkpoint-dir", run, "--steps", 13) == 2
    assert f"No checkpoint in {run} can be used" in capsys.readouterr().err
    assert tree(run) == before
    assert train_here("--resume", run / "step-00000012", "--checkpoint-dir", run, "--steps", 13) == 2
    assert "damaged in" in capsys.readouterr().err


def test_a_run_that_goes_on_reads_each_checkpoint_json_and_each_tensor_file_once(run, monkeypatch):
    from smedjan_common.checkpoint import load, manifest, tensors

    parsed, read = [], []
    monkeypatch.setattr(manifest, "_load", lambda path, parse=manifest._load: parsed.append(path) or parse(path))
    monkeypatch.setattr(tensors, "_read_into", lambda path, *rest, into=tensors._read_into: read.append(path) or into(path, *rest))
    monkeypatch.setattr(load, "regular_hash", None)
    assert train_here("--checkpoint-dir", run, "--steps", 13, "--dry-run") == 0
    assert sorted(parsed) == [run / f"step-{step:08d}" / "checkpoint.json" for step in (4, 8, 12)]
    assert read == []
    assert train_here("--checkpoint-dir", run, "--steps", 13) == 0
    assert read == [run / "step-00000012" / name for name in ("model.safetensors", "optimizer.safetensors")]


@pytest.mark.parametrize("where", ["inside", "the run itself", "outside"])
def test_a_run_that_goes_on_from_a_path_reads_each_checkpoint_json_once(run, tmp_path, monkeypatch, where):
    from smedjan_common.checkpoint import manifest

    (tmp_path / "link").symlink_to(run)
    resume, folder = {
        "inside": (tmp_path / "link" / "step-00000012", run),
        "the run itself": (run, run),
        "outside": (run / "step-00000008", tmp_path / "new"),
    }[where]
    parsed = []
    monkeypatch.setattr(manifest, "_load", lambda path, parse=manifest._load: parsed.append(path.resolve()) or parse(path))
    assert train_here("--resume", resume, "--checkpoint-dir", folder, "--steps", 13, "--dry-run") == 0
    steps = (8,) if where == "outside" else (4, 8, 12)
    assert sorted(parsed) == [(run / f"step-{step:08d}" / "checkpoint.json").resolve() for step in steps]


def test_only_broken_checkpoints_are_never_written_over(run, finished, capsys):
    for folder in run.glob("step-*"):
        (folder / "model.safetensors").write_bytes(b"gone")
    before = tree(run)
    assert train_here(*arguments(finished / "text.txt", run, 20)) == 2
    assert "damaged" in capsys.readouterr().err
    assert tree(run) == before


def test_a_finished_run_without_step_checkpoints_is_never_written_over(run, finished, capsys):
    for folder in run.glob("step-*"):
        shutil.rmtree(folder)
    before = tree(run)
    assert train_here(*arguments(finished / "text.txt", run, 20)) == 2
    assert f"--pretrained {run / 'final'}" in capsys.readouterr().err
    assert tree(run) == before


@pytest.mark.parametrize("newer", [("step-00000012",), ("step-00000004", "step-00000008", "step-00000012")])
def test_a_checkpoint_of_a_newer_format_is_never_written_over(run, capsys, newer):
    for name in newer:
        value("format_version", 2)(run / name)
    before = tree(run)
    for words in ((), ("--resume", run / "step-00000008")):
        assert train_here("--checkpoint-dir", run, "--steps", 20, *words) == 2
        assert "Install a newer smedjan" in capsys.readouterr().err
    assert tree(run) == before


def test_a_newer_format_before_the_newest_checkpoint_is_only_told(run, capsys):
    value("format_version", 2)(run / "step-00000004")
    assert train_here("--checkpoint-dir", run, "--steps", 13) == 0
    assert "note: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        {"flags": 3},
        {"flags": {"dataset": 5}},
        {"flags": {"keep": "2"}},
        {"flags": {"keep": -4}},
        {"flags": {"eval_batches": None}},
        {"flags": {"val_fraction": [0.1]}},
        {"flags": {"checkpoint_format": "zarr"}},
        {"dataset": 7, "flags": {}},
        {"dataset": {"path": 3}},
        {"dataset": {"files": [{"path": "a.bin", "weight": "x"}]}},
        {"dataset": {"files": [{}]}},
        {"val_dataset": [1]},
    ],
)
def test_a_config_of_wrong_types_is_refused_by_name(run, capsys, changes):
    config = run / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    before = tree(run)
    assert train_here("--checkpoint-dir", run, "--steps", 20) == 2
    assert f"error: {config}" in capsys.readouterr().err
    assert tree(run) == before


@pytest.mark.parametrize("content", [None, "{", "[" * 100_000, "3"])
def test_without_config_the_checkpoint_names_the_dataset(run, capsys, content):
    config = run / "config.json"
    config.unlink() if content is None else config.write_text(content)
    assert train_here("--checkpoint-dir", run, "--steps", 13) == 0
    out = capsys.readouterr().out
    assert f"note: {config} is missing or not readable" in out
    assert "note: dataset" not in out
    assert read_config(run)["dataset"]["path"].startswith("data/")


def test_the_format_that_a_run_asks_for_is_recorded_where_another_backend_goes_on(run, capsys):
    config = run / "config.json"
    recorded = json.loads(config.read_text())
    recorded["flags"]["checkpoint_format"] = "orbax"
    config.write_text(json.dumps(recorded))
    assert train_here("--checkpoint-dir", run, "--steps", 13) == 0
    assert read_config(run)["flags"]["checkpoint_format"] == "orbax"
    assert (run / "step-00000013").is_dir()
    assert "note: checkpoints are neutral from here on" in capsys.readouterr().out


def test_another_tokenizer_is_refused(run, finished, tmp_path, capsys):
    from smedjan_common.tokenizer import Tokenizer

    other = Tokenizer.train([finished / "text.txt"], vocab_size=280).save(tmp_path / "other.json")
    assert train_here("--checkpoint-dir", run, "--steps", 20, "--dataset", finished / "text.txt", "--tokenizer", other) == 2
    assert "tokenizer" in capsys.readouterr().err


def test_the_texts_are_tokenised_once(run, finished, capsys):
    train_here(*arguments(finished / "text.txt", run, 13))
    assert "Tokenised" not in capsys.readouterr().out
    assert len(list((run / "data").iterdir())) == 1
