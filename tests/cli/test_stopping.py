"""Ctrl-C, SIGTERM and output that goes nowhere: real processes with the buffers that users have, whose reader pauses or goes away."""

import fcntl
import importlib.util
import os
import re
import shutil
import signal
import sys
import time

import pytest

from smedjan_common.commands import generate
from smedjan_common.errors import SmedjanError, run_command
from smedjan_common.reporting.metrics import read_rows
from tests.fakes.bigram import load
from tests.fakes.runs import arguments, saved_steps, start, train_here, write_text

TRAIN, GENERATE = "tests.fakes.train", "tests.fakes.generate"
INTERRUPTIBLE = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}  # CI may start with SIGINT ignored

FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path)


def wait_until(holds, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not holds():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_until_it_stands_still(folder, process):
    """The process waits for its reader: no step was logged for a while."""
    wait_until(lambda: len(read_rows(folder)) > 2, process)
    count, since = 0, time.monotonic()
    while time.monotonic() - since < 0.3:
        if (now := len(read_rows(folder))) != count:
            count, since = now, time.monotonic()
        time.sleep(0.05)


@pytest.mark.skipif(not hasattr(fcntl, "F_SETPIPE_SZ"), reason="the size of a pipe cannot be set here")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_a_line_is_being_printed_to_a_reader_that_pauses_saves(text, tmp_path, number, code):
    words = arguments(text, tmp_path / "run", 100000, "--log-every", 1, "--checkpoint-every", 0, "--eval-every", 0)
    process = start(TRAIN, *words, **INTERRUPTIBLE)
    fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
    wait_until_it_stands_still(tmp_path / "run", process)
    process.send_signal(number)
    time.sleep(0.2)
    out, err = process.communicate(timeout=60)  # the reader goes on
    assert process.returncode == code, err
    assert out.count(f"{signal.Signals(number).name}: finishing this step") == 1
    [step] = saved_steps(tmp_path / "run")
    assert f"Stopped after step {step} of 100000" in out
    assert not err


def test_what_a_signal_does_is_said_at_once_and_a_second_one_says_what_is_lost(text, tmp_path):
    run = tmp_path / "run"
    words = arguments(text, run, 60, "--checkpoint-every", 2, "--log-every", 1, "--eval-every", 0)
    process = start(TRAIN, *words, fake="seconds=0.05,long_at=5,long=30", **INTERRUPTIBLE)
    wait_until(lambda: len(read_rows(run)) >= 4 and saved_steps(run) == [2, 4], process)
    time.sleep(0.3)  # in step 5 by now, and it knows of the checkpoint
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    while "SIGINT: finishing this step" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - begun < 10, "the step of 30 seconds was not waited for"
    assert process.returncode == 130
    assert err == "SIGINT again: stopped at once. Step 5 is lost: the same command goes on from step 4.\n"


def test_a_second_signal_ends_it_though_nobody_reads(text, tmp_path):
    words = arguments(text, tmp_path / "run", 100000, "--log-every", 1, "--checkpoint-every", 0, "--eval-every", 0)
    process = start(TRAIN, *words, **INTERRUPTIBLE)
    wait_until_it_stands_still(tmp_path / "run", process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert re.search(r"Steps 1 to \d+ are lost: there is no checkpoint yet\.", process.communicate()[1])


def test_what_a_writer_that_was_killed_left_is_removed_by_the_next_start(text, tmp_path, monkeypatch):
    words = arguments(text, tmp_path / "run", 4, "--checkpoint-every", 2)
    assert train_here(*words) == 0
    left = tmp_path / "run" / ".tmp-step-00000006-999999999-0123abcd"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    monkeypatch.setenv("SMEDJAN_FAKE", "oom_at=5")
    assert train_here(*arguments(text, tmp_path / "run", 6)) == 3, "it saves nothing itself"
    assert not left.exists()


@pytest.mark.parametrize("backend", ["jax", "mlx"])
def test_ctrl_c_in_generation_ends_it_quietly_even_in_a_compilation(backend, text, tmp_path):
    if not importlib.util.find_spec(backend):
        pytest.skip(f"{backend} is not installed here")
    assert train_here(*arguments(text, tmp_path / "run", 2)) == 0
    words = ("--checkpoint", tmp_path / "run", "--prompt", "the", "--max-tokens", 10000)
    for seconds in (0.0, 0.3):  # after the prompt is there: while the first step of decoding is made
        process = start(f"smedjan_{backend}.generate", *words, env={"SMEDJAN_NO_OPENBLAS": "1"}, **INTERRUPTIBLE)
        assert process.stdout.read(3) == "the", process.communicate()
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode in (-signal.SIGINT, 0), "a shell shows 130; 0 where it was ready before"
        assert not err or "context of" in err


def test_a_terminal_without_the_letters_of_a_sample_shows_others(text, tmp_path):
    (tmp_path / "text.txt").write_text("雪の城 — naïve\n" * 3000)
    words = arguments(text, tmp_path / "run", 6, "--sample-every", 2, "--sample-prompt", "雪", "--sample-tokens", 8)
    process = start(TRAIN, *words, env={"PYTHONIOENCODING": "latin-1"}, encoding="latin-1")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "  | ?" in out
    assert "雪" in (tmp_path / "run" / "samples" / "step-00000006.txt").read_text()
    words = ("--checkpoint", tmp_path / "run", "--prompt", "雪", "--max-tokens", 4)
    process = start(GENERATE, *words, env={"PYTHONIOENCODING": "latin-1"}, encoding="latin-1")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out[:1]) == (0, "?"), err


def test_a_sample_that_cannot_be_written_does_not_cost_the_run(text, tmp_path, capsys):
    """The prompt is what a command line gives where its bytes are not UTF-8; then a file stands where the folder should be."""
    words = arguments(text, tmp_path / "run", 4, "--sample-every", 2, "--sample-prompt", "caf\udce9", "--sample-tokens", 2)
    assert train_here(*words) == 0
    assert (tmp_path / "run" / "samples" / "step-00000004.txt").read_text(encoding="utf-8").startswith("caf?")
    shutil.rmtree(tmp_path / "run" / "samples")
    (tmp_path / "run" / "samples").touch()
    capsys.readouterr()
    assert train_here("--checkpoint-dir", tmp_path / "run", "--steps", 6) == 0
    assert "note: the sample was not written" in capsys.readouterr().out


@FULL
def test_output_on_a_full_disk_does_not_cost_the_run(text, tmp_path):
    with open("/dev/full", "w") as full:
        process = start(TRAIN, *arguments(text, tmp_path / "run", 3), stdout=full)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert err == "note: the output cannot be written any more (No space left on device); the run goes on.\n"
    with open("/dev/full", "w") as full:
        assert start(TRAIN, *arguments(text, tmp_path / "both", 3), stdout=full, stderr=full).wait(60) == 0
    assert saved_steps(tmp_path / "both") == [3]


def test_streams_that_are_closed_from_the_start_do_not_cost_the_run(text, tmp_path):
    def close():
        for descriptor in (0, 1, 2):
            os.close(descriptor)

    process = start(TRAIN, *arguments(text, tmp_path / "run", 3), stdout=None, stderr=None, preexec_fn=close)
    assert process.wait(60) == 0
    assert saved_steps(tmp_path / "run") == [3]
    assert [row["step"] for row in read_rows(tmp_path / "run") if "loss" in row] == [1, 3]


@FULL
def test_an_error_keeps_its_exit_code_where_it_cannot_be_printed(monkeypatch):
    def fail():
        raise SmedjanError("What.", "Why.", "Fix.")

    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert run_command(fail) == 2


def test_logits_that_are_not_finite_end_generation_with_exit_4_and_cost_training_its_sample_only(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SMEDJAN_FAKE", "nan_logits=1")
    assert train_here(*arguments(text, tmp_path / "run", 4, "--sample-every", 2)) == 0
    assert capsys.readouterr().out.count("note: no sample: The model gives nan as the largest logit") == 2
    assert generate.run("fake", load, ["--checkpoint", str(tmp_path / "run"), "--prompt", "the", "--temperature", "0"]) == 4
    err = capsys.readouterr().err
    assert err.startswith("error: The model gives nan as the largest logit of token")
    assert "Take an earlier checkpoint" in err
