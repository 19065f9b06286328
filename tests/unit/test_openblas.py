"""When MLX's program starts again with OpenBLAS, and when it must not."""

import os
import sys

import pytest

from smedjan_mlx import openblas


@pytest.fixture
def started(monkeypatch, tmp_path):
    """A process that looks like a fresh `python -m smedjan_mlx.train` on Linux; returns what was exec'ed."""
    calls = []
    library = tmp_path / "libopenblas.so.0"
    library.touch()
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)  # a Mac has none
    monkeypatch.setattr(sys, "argv", ["/x/smedjan_mlx/train.py", "--steps", "3"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "smedjan_mlx.train", "--steps", "3"])
    monkeypatch.delitem(sys.modules, "mlx", raising=False)
    for name in (openblas.OFF, openblas.STARTED, "LD_PRELOAD", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(openblas, "find_library", lambda: library)
    monkeypatch.setattr(openblas, "has_cuda_build", lambda: False)
    monkeypatch.setattr(os, "execve", lambda *args: calls.append(args))
    return calls


def test_the_same_command_starts_again_with_the_library_in_front_and_fixed_threads(started, capsys):
    openblas.preload(["--steps", "3"])
    [(program, words, environment)] = started
    assert words == [program, "-m", "smedjan_mlx.train", "--steps", "3"]
    assert environment["LD_PRELOAD"].endswith("libopenblas.so.0")
    assert environment["OPENBLAS_NUM_THREADS"] == "3"
    assert openblas.STARTED in environment, "so that it happens once"
    told = capsys.readouterr().err
    assert "SMEDJAN_NO_OPENBLAS=1" in told
    assert "/" not in told, "where this machine keeps it is nobody's business"


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.setenv(openblas.OFF, "1"),
        lambda m: m.setenv(openblas.STARTED, "yes"),
        lambda m: m.setenv("LD_PRELOAD", "/y/libopenblas.so"),
        lambda m: m.setattr(sys, "platform", "darwin"),
        lambda m: m.setattr(openblas, "has_cuda_build", lambda: True),
        lambda m: m.setattr(sys, "argv", ["/y/pytest/__main__.py"]),
    ],
    ids=["off", "started", "preloaded", "macos", "cuda", "inside another program"],
)
def test_it_does_not_start_again(started, monkeypatch, change):
    change(monkeypatch)
    openblas.preload([])
    assert not started


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_it_starts_again_though_nothing_can_be_said(started, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        openblas.preload([])
    assert len(started) == 1


def test_help_does_not_start_again(started):
    openblas.preload(["--help"])
    assert not started


def test_without_the_library_it_says_so_once(started, monkeypatch, capsys):
    monkeypatch.setattr(openblas, "find_library", lambda: None)
    openblas.preload([])
    openblas.preload([])
    assert capsys.readouterr().err.count("libopenblas0-pthread") == 1
    assert not started


def test_threads_that_the_user_chose_are_kept(started, monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "7")
    openblas.preload([])
    assert started[0][2]["OPENBLAS_NUM_THREADS"] == "7"


def test_measurements_are_started_again_as_well_and_tests_are_not(started, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/tests/mixers.py"])
    openblas.preload([])
    assert not started
    monkeypatch.setattr(sys, "argv", ["/x/bench/mixers.py"])
    openblas.preload([])
    assert started
