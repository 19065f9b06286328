"""Where a run may begin: never over the work of another program, never over a run that another process began meanwhile."""

import json
import os
import shutil

import pytest

from smedjan_common.errors import CheckpointError
from smedjan_common.run import data as run_data
from smedjan_common.run.folder import read_config
from smedjan_common.run.lock import RunLock
from smedjan_common.tokenizer import Tokenizer
from tests.fakes import bigram
from tests.fakes.runs import arguments, figures, saved_steps, start, train_here, tree, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def test_the_slower_of_two_starts_on_a_new_folder_trains_over_nothing(text, tmp_path, monkeypatch, capsys):
    """The faster one comes, in a process of its own, while the slower one tokenises: before, both found an empty folder."""
    words = arguments(text, tmp_path / "run", 3)
    came = []

    def slowly(*args, prepare=run_data.prepare, **options):
        if not came:
            process = start("tests.fakes.train", *words)
            came.append((process.communicate(timeout=60), process.returncode))
        return prepare(*args, **options)

    monkeypatch.setattr(run_data, "prepare", slowly)
    assert train_here(*words) == 0
    [((_, err), code)] = came
    assert code == 2
    assert "Another process is training into" in err
    assert saved_steps(tmp_path / "run") == [3]
    assert [row["step"] for row in figures(tmp_path / "run") if "loss" in row] == [1, 3]


def test_a_folder_that_a_refused_start_takes_back_is_made_again(tmp_path):
    folder = tmp_path / "runs" / "new"
    with RunLock() as lock:
        lock.take(folder)
        with pytest.raises(CheckpointError, match="Another process is training"):
            RunLock().take(folder)
    assert not folder.parent.exists(), "all that was made for nothing is gone"
    with RunLock() as lock:
        lock.take(folder)
        (folder / "config.json").touch()
    assert (folder / "config.json").exists()


def test_a_lock_on_a_folder_that_was_removed_meanwhile_is_none(tmp_path, monkeypatch):
    """Between opening the folder and locking it the run that had made it was refused, and removed it."""
    import fcntl

    folder, locking = tmp_path / "run", fcntl.flock

    def removed_once(fd, how):
        if folder.exists() and not removed:
            removed.append(folder.rmdir())
        return locking(fd, how)

    removed: list[None] = []
    monkeypatch.setattr(fcntl, "flock", removed_once)
    with RunLock() as lock:
        lock.take(folder)
        assert removed
        with pytest.raises(CheckpointError, match="Another process is training"):
            RunLock().take(folder)


HUGGING_FACE = {
    "config.json": json.dumps({"model_type": "llama", "architectures": ["X"]}),
    "model.safetensors": "w",
    "tokenizer.json": "{}",
}
PLOTS = {"metrics.jsonl": '{"step": 1, "accuracy": 0.5}\n', "loss.png": "a picture"}
FOREIGN = {
    "a model of Hugging Face": (HUGGING_FACE, "it holds config.json, model.safetensors, tokenizer.json."),
    "someone's metrics": (PLOTS, "it holds loss.png, metrics.jsonl."),
    "a thesis": ({"a.tex": "", "b.tex": "", "c.tex": "", "d.tex": "", ".git": ""}, "it holds a.tex, b.tex, c.tex and 1 more."),
    "data of another program": ({"data": {"train.csv": "a"}}, "it holds data."),
    "a config that is no object": ({"config.json": "[1]"}, "it holds config.json."),
    "samples": ({"samples": {"a.wav": ""}}, "it holds samples."),
}


def write_tree(folder, content):
    folder.mkdir(exist_ok=True)
    for name, value in content.items():
        write_tree(folder / name, value) if isinstance(value, dict) else (folder / name).write_text(value)


@pytest.mark.parametrize("more", [(), ("--dry-run",), ("--resume", "never")])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_folder_of_another_program_is_refused_and_what_is_in_the_way_named(text, tmp_path, capsys, kind, more):
    content, named = FOREIGN[kind]
    write_tree(tmp_path / "m", content)
    before = tree(tmp_path / "m")
    assert train_here(*arguments(text, tmp_path / "m", 2, *more)) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'm'} is not a run of smedjan, and not empty: {named}" in error
    assert "Give another --checkpoint-dir" in error
    assert tree(tmp_path / "m") == before


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_what_is_no_folder_is_refused_by_its_name(text, tmp_path, capsys, more):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to("nowhere")
    for folder, told in (("file", "file is not a folder."), ("file/run", "file is not a folder."), ("link", "link is a link to nothing.")):
        assert train_here(*arguments(text, tmp_path / folder, 2, *more)) == 2
        error = capsys.readouterr().err
        assert f"error: {tmp_path / told}\n" in error
        assert "Give another --checkpoint-dir" in error
    assert tree(tmp_path) == {"file": b"precious"}


def test_an_input_with_the_name_of_an_output_is_in_the_way(text, tmp_path, capsys):
    write_tree(tmp_path / "m", {"metrics.jsonl": '{"text": "a"}\n'})
    assert train_here(*arguments(tmp_path / "m" / "metrics.jsonl", tmp_path / "m", 2)) == 2
    assert "it holds metrics.jsonl" in capsys.readouterr().err


def test_inputs_dot_files_and_the_data_of_a_killed_run_are_not_in_the_way(text, tmp_path, capsys):
    run = tmp_path / "run"
    write_tree(run, {".DS_Store": "", ".gitignore": "*", "text.txt": text.read_text(), "more": {"b.txt": "a b c\n" * 50}})
    Tokenizer.train([text], vocab_size=300).save(run / "tok.json")
    words = without(arguments(run / "text.txt", run, 2), "--vocab-size", "--val-fraction")
    words += ["--val-dataset", run / "more", "--tokenizer", run / "tok.json"]

    class Killed(bigram.BigramBackend):
        def __init__(self, *made):
            super().__init__(*made)
            if len([*run.glob("data/*")]) == 2:  # both texts are tokenised
                raise KeyboardInterrupt

    assert train_here(*words, backend=Killed) == 130
    assert (run / "data").is_dir()
    assert not (run / "config.json").exists()
    capsys.readouterr()
    assert train_here(*words) == 0
    assert "Tokenised" not in capsys.readouterr().out


def without(words, *flags):
    """A command line without these flags and their values."""
    return [word for word, before in zip(words, ["", *words], strict=False) if word not in flags and before not in flags]


@pytest.mark.parametrize("gone", ["config.json", "checkpoints"])
def test_a_run_is_known_by_its_config_or_by_its_checkpoints(text, tmp_path, gone):
    run = tmp_path / "run"
    assert train_here(*arguments(text, run, 2, "--eval-every", 0)) == 0
    (run / "notes.txt").write_text("the user's own")
    if gone == "config.json":
        (run / "config.json").unlink()
    else:
        for path in (run / "step-00000002", run / "final"):
            shutil.rmtree(path)
    assert train_here(*arguments(text, run, 3, "--eval-every", 0)) == 0
    assert saved_steps(run)[-1] == 3


def test_a_config_of_another_program_beside_checkpoints_is_not_replaced(text, tmp_path, capsys):
    run = tmp_path / "run"
    assert train_here(*arguments(text, run, 2, "--eval-every", 0)) == 0
    write_tree(run, {"config.json": HUGGING_FACE["config.json"]})
    assert train_here(*arguments(text, run, 3, "--eval-every", 0)) == 2
    assert "config.json" in capsys.readouterr().err


def test_the_folder_is_enough_from_another_directory(text, tmp_path, monkeypatch, capsys):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    shutil.copy(text, home / "text.txt")
    monkeypatch.chdir(home)
    Tokenizer.train(["text.txt"], vocab_size=300).save("tok.json")
    words = without(arguments("text.txt", "run", 2, "--eval-every", 0), "--vocab-size")
    assert train_here(*words, "--tokenizer", "tok.json") == 0
    monkeypatch.chdir(elsewhere)
    assert train_here("--checkpoint-dir", "../home/run", "--steps", 3) == 0
    assert "Tokenised" in capsys.readouterr().out
    flags = read_config(home / "run")["flags"]
    assert flags["tokenizer"] == str(home / "tok.json")
    assert flags["dataset"] == [str(home / "text.txt")]
    shutil.rmtree(home / "run" / "data")  # the texts themselves are asked then
    assert train_here("--checkpoint-dir", "../home/run", "--steps", 4) == 0
    os.rename(home / "run", elsewhere / "moved")
    (home / "tok.json").unlink()
    (home / "text.txt").unlink()
    assert train_here("--checkpoint-dir", "moved", "--steps", 5) == 0, "nothing outside is needed"


LATE = [
    ("--vocab-size", 100, "A vocabulary of 100 is too small"),
    ("--vocab-size", 1 << 22, "too large"),
    ("--mesh", "tensor=3", "--mesh tensor=3"),
    ("--mesh", "data=4", "there are no 4 devices"),
    ("--attention", "fused", "no fused attention here"),
]


class Judging(bigram.BigramBackend):
    """As a framework does, it refuses what its devices cannot do when it is made."""

    def __init__(self, model, train, mesh=None):
        from smedjan_common.errors import ConfigError

        super().__init__(model, train, mesh)
        if mesh and mesh.size > 1:
            raise ConfigError("there are no 4 devices")
        if train.attention == "fused":
            raise ConfigError("no fused attention here")


@pytest.mark.parametrize(("flag", "value", "said"), LATE)
def test_what_cannot_be_is_refused_before_texts_are_tokenised(text, tmp_path, capsys, flag, value, said):
    words = arguments(text, tmp_path / "run", 2)
    assert train_here(*words, flag, value, backend=Judging) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists(), "nothing was tokenised"


def test_fused_attention_without_a_gpu_is_refused_by_jax_before_texts_are_tokenised(text, tmp_path, capsys):
    pytest.importorskip("jax")
    from smedjan_common.commands import train
    from smedjan_jax.train import load

    for mixer in ("attention", "mla"):
        words = [*arguments(text, tmp_path / "run", 2), "--attention", "fused", "--dtype", "float32", "--mixer", mixer]
        assert train.run("jax", load, words) == 2
        assert "--attention fused cannot run here" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only_is_refused_before_texts_are_tokenised(text, tmp_path, capsys, monkeypatch):
    (tmp_path / "run").mkdir(mode=0o500)
    assert train_here(*arguments(text, tmp_path / "run", 2)) == 2
    assert "Permission denied" in capsys.readouterr().err


def test_a_folder_that_takes_no_files_is_refused_before_texts_are_tokenised(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert train_here(*arguments(text, tmp_path / "run", 2)) == 2
    assert "Permission denied" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json"])
def test_a_pipe_in_the_place_of_a_file_of_a_run_is_not_waited_for(text, tmp_path, capsys, name):
    assert train_here(*arguments(text, tmp_path / "run", 2)) == 0
    (tmp_path / "run" / name).unlink()
    os.mkfifo(tmp_path / "run" / name)
    capsys.readouterr()
    assert train_here(*arguments(text, tmp_path / "run", 3)) == (2 if name == "metrics.jsonl" else 0)
    told = capsys.readouterr()
    assert f"{tmp_path / 'run' / name}" in told.out + told.err


def test_a_folder_in_the_place_of_a_picture_or_of_samples_is_told_and_ends_no_run(text, tmp_path, capsys):
    (tmp_path / "run" / "loss.png").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"versions": {"smedjan": "0"}}))
    (tmp_path / "run" / "samples").write_text("")
    assert train_here(*arguments(text, tmp_path / "run", 2, "--sample-every", 1)) == 0
    out = capsys.readouterr().out
    assert "note: loss.png was not drawn: Is a directory\n" in out
    assert "note: the sample was not written: " in out
    assert "Errno" not in out
