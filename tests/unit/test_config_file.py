"""--config: a file says flags, the command line wins, a run's own file repeats it, and what is wrong is told with its line."""

import json
import shutil
import subprocess
import sys
import tomllib

import pytest

from smedjan_common.run.config_file import to_toml
from smedjan_common.run.given import parse
from tests.fakes.runs import ROOT, SMALL, arguments, arrays, figures, train_here, write_text


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path)


def write(tmp_path, content: str):
    file = tmp_path / "run.toml"
    file.write_text(content)
    return file


TABLES = """
# a comment = 3
seed = 5
[data]
dataset = ["a.txt", "-b.txt"]
[model]
size = "custom"
dim = 32
mixer = ["ssm", "attention"]
[mixers]
qk-norm = true
[training]
lr = 3e-4
z_loss = 1e-4
steps = 400
muon-nesterov = false
weight_decay = 0
"""


def test_names_with_dashes_or_not_flat_or_in_tables_are_flags_and_the_command_line_wins(tmp_path):
    file = write(tmp_path, TABLES)
    flags, given = parse(["--config", str(file), "--steps", "7", "--no-qk-norm"])
    assert (flags.training.seed, flags.training.lr, flags.training.z_loss, flags.training.weight_decay) == (5, 3e-4, 1e-4, 0)
    assert (flags.model.size, flags.model.dim, flags.model.mixer) == ("custom", 32, "ssm,attention")
    assert flags.data.dataset == ("a.txt", "./-b.txt")
    assert (flags.training.steps, flags.mixers.qk_norm, flags.training.muon_nesterov) == (7, False, False)
    assert {"seed", "lr", "dataset", "steps", "qk_norm", "mixer", "config"} <= given
    assert parse(["other.txt", f"--config={file}"])[0].data.dataset == ("other.txt",)


def test_a_file_of_an_editor_that_begins_with_a_byte_order_mark_is_read(tmp_path):
    assert parse(["--config", str(write(tmp_path, "\ufeffsteps = 7\n"))])[0].training.steps == 7


@pytest.mark.parametrize("setting", ['checkpoint_dir = "a\\u0000b"', 'tokenizer = "\\u0000"', 'dataset = ["a\\u0000"]'])
def test_a_text_that_no_path_can_be_is_told_with_its_line(tmp_path, setting, capsys):
    with pytest.raises(SystemExit):
        parse(["--config", str(write(tmp_path, f"\n{setting}\n"))])
    assert f"line 2: {setting.partition(' ')[0]} cannot be" in capsys.readouterr().err


def test_a_name_in_the_file_cannot_steer_the_terminal(tmp_path):
    file = write(tmp_path, '"\\u001b[2Jx" = 1\n')
    found = subprocess.run(
        [sys.executable, "-m", "smedjan_common.cli", "train", "--config", str(file)], capture_output=True, text=True, cwd=ROOT
    )
    assert found.returncode == 2
    assert "\u241b[2Jx is no flag" in found.stderr


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        ("steps = 4\nlearning_rate = 1e-3\n", 2, "It is called --lr here."),
        ("[training]\nstepz = 4\n", 2, "Did you mean --steps or "),
        ("[modell]\ndim = 4\n", 2, "Did you mean model?"),
        ("[model]\nsteps = 4\n", 2, "It is of [training]."),
        ("steps = 4\n\n[training]\nsteps = 5\n", 4, "line 1"),
        ('lr = "3e-4"\n', 1, "It must be a number."),
        ("steps = 4.5\n", 1, "It must be a whole number."),
        ("size = 3\n", 1, "It must be text in quotes."),
        ('qk_norm = "yes"\n', 1, "It must be true or false."),
        ("dataset = []\n", 1, "It must be text in quotes."),
        ("dry_run = true\n", 1, "Write --dry-run there."),
        ('resume = "never"\n', 1, "Write --resume there."),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path, capsys, content, line, says):
    file = write(tmp_path, content)
    with pytest.raises(SystemExit) as stopped:
        parse(["--config", str(file)])
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert f"error: {file}, line {line}: " in err
    assert says in err


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.toml", b"steps 4", "is not TOML"),
        ("a.toml", b"steps = 4\nsteps = 5", "is not TOML"),
        ("a.toml", b"\xff\xfe", "cannot be read"),
        ("a.json", b"{}", "is no config.json of a run"),
        ("a.json", b"[" * 9999, "is no config.json of a run"),
        ("a.json", b'{"model": {"dim": -3}, "train": {}, "flags": {}}', "cannot be used"),
        (None, b"", "There is no file"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, capsys, name, content, says):
    file = tmp_path / (name or "none.toml")
    if name:
        file.write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        parse(["--config", str(file)])
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


def test_values_are_checked_as_flags_are(text, tmp_path, capsys):
    file = write(tmp_path, "muon_steps = 3\n")
    assert (
        train_here(*arguments(text, tmp_path / "run", 2)[:-10], "--dataset", text, "--checkpoint-dir", tmp_path / "run", "--config", file)
        == 2
    )
    assert "--muon-steps would do nothing." in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("kind", ["config.toml", "config.json"])
def test_a_run_can_be_repeated_by_what_it_wrote(text, tmp_path, kind):
    more = ("--seed", 3, "--weight-decay", 0.3, "--lr-schedule", "wsd", "--log-every", 3, "--val-fraction", 0.2)
    more += ("--window", 8, "--layers", 2, "--window-layers", "on,off", "--rope-layers", "off,on")
    words = [*SMALL.replace("--val-fraction 0.1 ", "").split(), "--dataset", text, "--checkpoint-dir", tmp_path / "a", "--steps", 12, *more]
    assert train_here(*words) == 0
    assert train_here("--config", tmp_path / "a" / kind, "--checkpoint-dir", tmp_path / "b") == 0
    assert figures(tmp_path / "a") == figures(tmp_path / "b")
    assert arrays(tmp_path / "a") == arrays(tmp_path / "b")
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in "ab")
    assert first["model"] == second["model"]
    assert first["train"] == second["train"]
    assert train_here("--config", tmp_path / "a" / kind, "--checkpoint-dir", tmp_path / "a") == 0, "the same run goes on from its own file"


def test_config_toml_has_what_was_given_and_a_run_that_goes_on_adds_to_it(text, tmp_path):
    run = tmp_path / "run"
    assert train_here(*arguments(text, run, 4, "--sample-prompt", 'say "hé"\n\\', "--sample-every", 2)) == 0
    had = tomllib.loads((run / "config.toml").read_text())
    assert had["data"]["dataset"] == [str(text)]
    assert had["report"]["sample_prompt"] == 'say "hé"\n\\'
    assert had["training"] == {"steps": 4, "batch_size": 4, "seq_len": 16, "lr": 0.02}
    assert "checkpoint_dir" not in had["run"]
    assert train_here("--checkpoint-dir", run, "--steps", 6, "--z-loss", 1e-4) == 0
    now = tomllib.loads((run / "config.toml").read_text())
    assert now == had | {"training": had["training"] | {"steps": 6, "z_loss": 1e-4}}
    assert to_toml({"steps": 3}, "[not toml").endswith("[training]\nsteps = 3\n")


def test_a_dry_run_says_from_where_each_value_is(text, tmp_path, capsys):
    file = write(tmp_path, f'dataset = "{text}"\nbatch_size = 4\nseq_len = 16\n\n[training]\nlr = 0.02\nsteps = 9\n')
    words = (
        "--config",
        file,
        "--steps",
        5,
        "--checkpoint-dir",
        tmp_path / "run",
        "--size",
        "custom",
        "--dim",
        16,
        "--layers",
        1,
        "--heads",
        2,
    )
    assert train_here(*words, "--vocab-size", 300, "--dry-run") == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("--")}
    assert lines["--lr"].endswith(f"{file}, line 6")
    assert lines["--batch-size"].endswith(f"{file}, line 2")
    assert lines["--steps"].split()[1:] == ["5", "the", "command", "line"]
    assert lines["--dim"].endswith("the command line")
    assert not (tmp_path / "run").exists()


def test_the_backend_that_a_file_names_runs(tmp_path, monkeypatch):
    from smedjan_common.commands import train

    called = []
    monkeypatch.setattr("smedjan_common.commands.backends.delegate", lambda command, argv: called.append(argv) or 0)
    file = write(tmp_path, 'backend = "mlx"\nsteps = 3\n')
    for words in (["--config", str(file)], ["--config", str(file), "--backend", "jax"], ["--steps", "3"], ["--config", "nothing.toml"]):
        train.main(words)
    assert called[0] == ["--config", str(file), "--backend=mlx"]
    assert [words[-2:] for words in called[1:]] == [["--backend", "jax"], ["--steps", "3"], ["--config", "nothing.toml"]]
    shutil.rmtree(tmp_path)
