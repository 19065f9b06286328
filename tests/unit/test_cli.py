"""The command table: help in no time, light imports, near names; and the choice of a backend."""

import os
import resource
import subprocess
import sys

import pytest

from smedjan_common import cli
from smedjan_common.commands import backends
from smedjan_common.errors import ConfigError


def smedjan(*words):
    return subprocess.run([sys.executable, "-m", "smedjan_common.cli", *words], capture_output=True, text=True, encoding="utf-8")


def test_the_overview_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in cli.COMMANDS)


def test_no_command_is_exit_2_with_the_overview():
    done = smedjan()
    assert done.returncode == 2
    assert "usage: smedjan" in done.stderr


def test_an_unknown_command_lists_near_ones(capsys):
    assert cli.main(["trian"]) == 2
    assert "Did you mean train " in capsys.readouterr().err


@pytest.mark.parametrize("words", [("help", "info"), ("help", "info", "--verify")])
def test_help_of_a_command_is_its_own_help(words, capsys):
    shown = []
    for line in (words, ("info", "--help")):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*line])
        shown.append((stopped.value.code, capsys.readouterr().out))
    assert shown[0] == shown[1]
    assert shown[0][1].startswith("usage: smedjan info")


def test_help_of_a_command_that_there_is_not_names_the_near_one(capsys):
    assert cli.main(["help", "trian"]) == 2
    assert "Did you mean train " in capsys.readouterr().err
    assert cli.main(["help"]) == 0
    assert capsys.readouterr().out == cli.overview() + "\n"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_every_command_is_quick_and_imports_no_framework(name):
    code = f"""
import sys
from smedjan_common import cli
try: cli.main([{name!r}, "--help"])
except SystemExit as stopped: assert stopped.code == 0
heavy = {{"jax", "mlx", "flax", "matplotlib", "numpy", "torch"}} & set(sys.modules)
assert not heavy, heavy
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 0.6, "0.2 s on a quiet machine; processor time doubles on a busy one"


def test_the_program_itself_imports_nothing_it_does_not_need():
    code = "import sys; from smedjan_common import cli; cli.main(['--help']); sys.exit(len({'tyro', 'numpy', 'jax'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_backend_is_chosen_by_flag_or_machine(monkeypatch):
    assert backends.choose(["--steps", "3", "--backend", "mlx"]) == "mlx"
    assert backends.choose(["--backend=jax"]) == "jax"
    assert backends.choose(["--backend=jax", "--steps", "3", "--backend", "mlx"]) == "mlx"
    monkeypatch.setattr(backends, "installed", lambda name: name == "mlx")
    monkeypatch.setattr(sys, "platform", "linux")
    assert backends.choose([]) == "mlx"
    monkeypatch.setattr(backends, "installed", lambda name: True)
    assert backends.choose(["--backend", "auto"]) == "jax"
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(backends.platform, "machine", lambda: "arm64")
    assert backends.choose([]) == "mlx"


def test_an_unknown_or_missing_backend_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="mlx"):
        backends.choose(["--backend", "mxl"])
    monkeypatch.setattr(backends, "installed", lambda name: False)
    with pytest.raises(ConfigError, match="not installed"):
        backends.check_installed("jax")


def test_the_program_of_one_backend_refuses_to_be_the_other(tmp_path):
    words = [sys.executable, "-m", "smedjan_jax.train", "--backend", "mlx", "--dataset", "x.txt"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    assert done.returncode == 2
    assert "--backend mlx" in done.stderr


@pytest.mark.parametrize("backend", backends.BACKENDS)
@pytest.mark.parametrize(("program", "flag"), [("train", "--dataset"), ("generate", "--checkpoint")])
def test_the_program_of_each_backend_takes_a_path_without_a_flag(backend, program, flag):
    words = [sys.executable, "-m", f"smedjan_{backend}.{program}", "one", flag, "two"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"'one' and {flag} are both given." in done.stderr


def test_a_reader_that_leaves_early_gets_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)  # what `| head` does, only sooner
    done = subprocess.run([sys.executable, "-m", "smedjan_common.cli", "train", "--help"], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("error", [ImportError("libcudart.so.12: cannot open file"), ModuleNotFoundError("No module", name="scipy")])
def test_a_backend_that_is_installed_and_does_not_load_is_told(capsys, monkeypatch, error):
    def run():
        raise error

    monkeypatch.setattr(backends, "installed", lambda name: True)
    assert backends.program("jax", [], run) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: The backend jax is installed, but does not load.\n       {str(error)[0].upper()}{str(error)[1:]}.\n")
    assert "Install it again: pip install" in told


def test_a_fault_of_smedjan_s_own_modules_is_no_fault_of_the_backend(monkeypatch):
    def run():
        raise ImportError("cannot import name 'x'", name="smedjan_jax.model")

    monkeypatch.setattr(backends, "installed", lambda name: True)
    with pytest.raises(ImportError):
        backends.program("jax", [], run)
